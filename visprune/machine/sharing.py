# SPDX-License-Identifier: Apache-2.0
"""Encode pictures once and ask about them many times, under any method."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.features import encoder_output
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import Picture
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
from visprune.machine.encoder.tap import EncoderTap, pictures_of
from visprune.machine.find import find_adapter
from visprune.machine.plan import Plan, make_plan
from visprune.machine.run import Run


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

    @property
    def pictures(self) -> list[Picture]:
        """What is known of each picture."""
        return pictures_of(encoder_output(self.features), "image")

    @property
    def nbytes(self) -> int:
        """Bytes of the features and of what they carry for methods."""
        values = [value for picture in self.pictures for value in vars(picture).values()]
        nested = [list(v.values()) if isinstance(v, dict) else [v] for v in values]
        tensors = [v for several in nested for v in several if isinstance(v, Tensor)]
        return sum(tensor.nbytes for tensor in (*self.features, *tensors))

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
    run: Run | None = None,
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
        run: a run in force on the model. Where its method acts inside the encoder, the pictures are
            encoded under it, and can be asked about under the same method alone.
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
    if run is not None and run.encoder is not None:  # it listens itself
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            output = adapter.core.get_image_features(**inputs, return_dict=True)
        return _handed_over(adapter, output)
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
    return _handed_over(adapter, output)


def _handed_over(adapter: Any, output: Any) -> EncodedImages:
    """The features of an encoder's output, if there is one tensor of each picture and no more."""
    features = getattr(output, "pooler_output", None)
    if not isinstance(features, list | tuple) or output.get("deepstack_features") is not None:
        raise UnsupportedModel(
            f"The encoder of {adapter.config.model_type} does not give one tensor of features a "
            f"picture (tiles or one stacked tensor, or DeepStack beside it), which could be "
            f"handed over picture by picture. Pass pixel_values with each prompt."
        )
    return EncodedImages(list(features))


def _shown(adapter: Any, methods: Iterable[PruningMethod] | None) -> list[Signal]:
    """Signals of the encoder and the pixels that are kept."""
    if methods is None:
        return _usual(adapter)
    plans = [make_plan(method, adapter.spec) for method in methods]
    return list(dict.fromkeys(signal for plan in plans for signal in _of_pictures(plan)))


def _usual(adapter: VLMAdapter) -> list[Signal]:
    """What most methods ask for."""
    spec = adapter.spec
    usual = [ClsAttention("last"), ClsAttention("feature"), EncoderKeys("feature")]
    found: list[Signal] = [s for s in usual if spec.has_cls and s.missing(spec) is None]
    return [*found, Fingerprint()]


def _of_pictures(plan: Plan) -> list[Signal]:
    return [*plan.encoder_signals, *plan.picture_signals]


def encodes_alike(adapter: VLMAdapter, method: PruningMethod) -> Hashable:
    """Return what is equal for methods that can be asked about the same encoded pictures.

    Args:
        adapter: of the model.
        method: the method.

    Returns:
        ``None`` where pictures that were encoded without naming methods will do.
    """
    plan = make_plan(method, adapter.spec)
    first = plan.inside if plan.encoder else None if plan.pixels is None else plan.pixels[1]
    if first is not None:
        return repr(first)  # parameters may be lists, which have no hash
    usual = _usual(adapter)
    return tuple(signal for signal in _of_pictures(plan) if signal not in usual) or None
