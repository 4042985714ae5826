# SPDX-License-Identifier: Apache-2.0
"""Masks and cache that a call of a decoder with sliding windows is opened with.

Such a decoder makes masks by kind of layer, and its cache throws away what no window sees. Both
count in slots: of a pruned sequence they are made of the whole call, before a token is gone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visprune.backbones.hf.cache import CACHE_ARGUMENT, SlotLayer, cache_of, open_windows
from visprune.backbones.hf.masks import masks_by_kind
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout
from visprune.errors import UnsupportedModel


def opened(
    adapter: VLMAdapter,
    call: dict[str, Any],
    kwargs: dict[str, Any],
    layouts: list[ImageLayout],
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The masks of a call by kind of layer, and its arguments with a plain mask and an open cache.

    Args:
        adapter: the model family.
        call: the arguments of ``core``.
        kwargs: the arguments of the decoder.
        layouts: the pictures of the call.

    Returns:
        ``None`` in place of masks: the decoder makes its own.

    Raises:
        UnsupportedModel: a picture of a later turn that is seen both ways.
    """
    masks = _masks(adapter, kwargs, layouts) if adapter.windowed else None
    if masks is None and not isinstance(kwargs.get("attention_mask"), dict):
        return masks, kwargs
    # What the decoder is given may be a dict, made of this by the core.
    plain = kwargs.get("attention_mask")
    if isinstance(plain, dict) or adapter.masks_before:
        plain = call.get("attention_mask")
    cache = cache_of(kwargs)
    if layouts and (cache is not None or makes_cache(adapter, kwargs)):
        cache = open_windows(cache, adapter.text_config)
    return masks, {**kwargs, "attention_mask": plain, CACHE_ARGUMENT: cache}


def makes_cache(adapter: VLMAdapter, kwargs: dict[str, Any]) -> bool:
    """Whether the decoder would make a cache of its own."""
    use = kwargs.get("use_cache")
    return bool(getattr(adapter.text_config, "use_cache", True) if use is None else use)


def _masks(
    adapter: VLMAdapter, kwargs: dict[str, Any], layouts: list[ImageLayout]
) -> dict[str, Any] | None:
    """The masks that a decoder with windows makes of the whole call; ``None``: leave it be."""
    cache = cache_of(kwargs)
    pruned = cache is not None and any(isinstance(x, SlotLayer) for x in cache.layers)
    if not layouts and not pruned:
        return None
    mask = kwargs.get("attention_mask")
    both = isinstance(mask, dict) and adapter.sees_both_ways
    before = both or adapter.masks_before
    if layouts and before and cache is not None and cache.get_seq_length():
        raise UnsupportedModel(
            f"A picture of a later turn is seen both ways by {adapter.config.model_type}, and "
            f"transformers gives that to the tokens at the beginning of the cache. Give the "
            f"conversation in one prompt."
        )
    if pruned and isinstance(mask, Tensor) and mask.dim() == 2:
        # Old tokens are seen by their places; of the new ones among each other it tells.
        cache, mask = None, mask[:, -kwargs["inputs_embeds"].shape[1] :]
    kinds = {adapter.kind_of(n) for n in range(len(adapter.layers))}
    return masks_by_kind(adapter.text_config, kwargs["inputs_embeds"], mask, cache, kinds)
