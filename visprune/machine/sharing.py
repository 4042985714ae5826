# SPDX-License-Identifier: Apache-2.0
"""Encode pictures once and ask about them many times, under any method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.features import encoder_output
from visprune.core.method import PruningMethod
from visprune.core.signals import (
    ClsAttention,
    EncoderKeys,
    EncoderSignal,
    Fingerprint,
    PictureSignal,
    Signal,
)
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.encoder.tap import EncoderTap
from visprune.machine.find import find_adapter
from visprune.machine.plan import make_plan


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


def encode_images(
    model: Any,
    *,
    grad: bool = False,
    methods: Iterable[PruningMethod] | None = None,
    **inputs: Any,
) -> EncodedImages:
    """Run the encoder and the projector once, and keep the signals that methods will ask for.

    The prompts then take ``mm_encoder_outputs=encoded.select(...)`` instead of pixels
    (transformers 5.18 or later).

    Args:
        model: a model of a family with an adapter; it may be pruned or not.
        grad: keep what gradients need, to train the encoder.
        methods: whose signals; ``None``: attention and keys of the class token's encoders, which
            the methods of the table ask for, and what controls draw by.
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
    shown = _shown(adapter, methods)
    tap = EncoderTap(
        adapter,
        [s for s in shown if isinstance(s, EncoderSignal)],
        [s for s in shown if isinstance(s, PictureSignal)],
    )
    tap.install()
    try:
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            output = adapter.core.get_image_features(**inputs, return_dict=True)
    finally:
        tap.remove()
    return EncodedImages(list(output.pooler_output))


def _shown(adapter: Any, methods: Iterable[PruningMethod] | None) -> list[Signal]:
    """Signals of the encoder and the pixels that are kept."""
    spec = adapter.spec
    if methods is None:
        usual = [ClsAttention("last"), ClsAttention("feature"), EncoderKeys("feature")]
        found: list[Signal] = [s for s in usual if spec.has_cls and s.missing(spec) is None]
        return [*found, Fingerprint()]
    plans = [make_plan(method, spec) for method in methods]
    wanted = [s for plan in plans for s in (*plan.encoder_signals, *plan.picture_signals)]
    return list(dict.fromkeys(wanted))
