# SPDX-License-Identifier: Apache-2.0
"""Several questions about one picture on one cache, each as if it were the only one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.backbones.vlm.base import VLMAdapter
from visprune.errors import UnsupportedModel

__all__ = ["OneCache", "no_turns"]


def no_turns(adapter: VLMAdapter) -> str | None:
    """Why the cache of a family cannot be taken back to behind a picture; ``None``: it can."""
    family = adapter.config.model_type
    if adapter.recurrent:
        return f"The recurrent layers of {family} cannot be taken back to behind the picture."
    if any(adapter.window(layer) is not None for layer in range(len(adapter.layers))):
        return f"Layers of {family} see a window, and let go of what a question before would see."
    if adapter.multi_axis_rope:
        return f"{family} counts positions behind a picture on three axes, which is not done here."
    return None


class OneCache:
    """What the prompt of one question leaves, for this and other questions about its picture.

    A question is put behind the picture, at the positions that it would have in a prompt of its
    own; the text of the one before is taken out of the cache first. So the answers to it differ
    from those of a prompt each by what the cache keeps of the picture, and by nothing else.

    Args:
        model: the model; a method may be in force.
        adapter: its adapter, of a family that :func:`no_turns` says nothing against.
        inputs: what the model takes for the first question, one row.
    """

    def __init__(self, model: Any, adapter: VLMAdapter, inputs: Mapping[str, Any]) -> None:
        last = {} if adapter.heads_all else {"logits_to_keep": 1}
        self._model = model
        self._cache = cache_of(model(**inputs, use_cache=True, **last))
        ids = inputs["input_ids"][0]
        behind = int((ids == adapter.token_id("image")).nonzero()[-1]) + 1
        self._shared = ids[:behind]

    def ask(self, inputs: Mapping[str, Any], generation: Mapping[str, Any]) -> Tensor:
        """Generate an answer.

        Args:
            inputs: what the model would take for the question in a prompt of its own, one row.
            generation: options of ``generate``.

        Returns:
            Ids of the answer, ``[n]``.

        Raises:
            UnsupportedModel: the prompt begins otherwise than the first one.
        """
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        behind = len(self._shared)
        if not torch.equal(texts["input_ids"][0, :behind], self._shared):
            raise UnsupportedModel(
                "Questions share a cache where all that stands before them is the same; these "
                "prompts differ before the end of the picture. Leave turns out."
            )
        self._cache.crop(behind - self._cache.get_seq_length())
        ids = self._model.generate(**texts, **{CACHE_ARGUMENT: self._cache}, **generation)
        return ids[0, texts["input_ids"].shape[1] :]
