# SPDX-License-Identifier: Apache-2.0
"""Encode pictures once and ask about them many times, under any method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.features import encoder_output
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.encoder.tap import EncoderTap
from visprune.machine.find import find_adapter


@dataclass(frozen=True)
class EncodedImages:
    """Pictures that went through the encoder and the projector.

    Attributes:
        features: one ``[N, D]`` tensor per picture; each carries what methods may ask of the
            encoder (class-token attention, keys, a fingerprint of the pixels).
    """

    features: list[Tensor]

    def __len__(self) -> int:
        return len(self.features)

    def select(self, numbers: Iterable[int] | None = None) -> dict[str, Any]:
        """Return ``mm_encoder_outputs`` for a prompt batch with these pictures, repeats allowed.

        Example:
            >>> model(input_ids=..., mm_encoder_outputs=encoded.select([0, 0, 1]))  # doctest: +SKIP
        """
        chosen = range(len(self)) if numbers is None else numbers
        return {"image": encoder_output([self.features[i] for i in chosen])}


def encode_images(model: Any, *, grad: bool = False, **inputs: Any) -> EncodedImages:
    """Run the encoder and the projector once, and keep every signal that a method may ask for.

    The prompts then take ``mm_encoder_outputs=encoded.select(...)`` instead of pixels
    (transformers 5.18 or later).

    Args:
        model: a model of a family with an adapter; it may be pruned or not.
        grad: keep what gradients need, to train the encoder.
        **inputs: what ``get_image_features`` of the family takes: ``pixel_values``, and
            ``image_sizes`` or ``image_grid_thw``.

    Raises:
        ConfigError: no ``pixel_values``.
        UnsupportedModel: the model has no adapter, or takes no encoded pictures.
    """
    adapter = find_adapter(model)
    if inputs.get("pixel_values") is None:
        raise ConfigError(
            f"encode_images takes pixel_values; got {', '.join(inputs) or 'nothing'}."
        )
    if not adapter.takes_encoded:
        raise UnsupportedModel(
            f"{type(adapter.model).__name__} of this transformers version takes no encoded "
            f"pictures (mm_encoder_outputs, transformers 5.18 or later). Upgrade, or pass "
            f"pixel_values."
        )
    with_cls = adapter.spec.has_cls
    tap = EncoderTap(
        adapter, ("last", "feature") if with_cls else (), keys=with_cls, fingerprints=True
    )
    before = {k: v for k, v in vars(adapter.core).items() if k.startswith("get_")}
    tap.install()
    try:
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            output = adapter.core.get_image_features(**inputs, return_dict=True)
    finally:
        tap.remove()
        vars(adapter.core).update(before)
    return EncodedImages(list(output.pooler_output))
