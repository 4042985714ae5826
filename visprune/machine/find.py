# SPDX-License-Identifier: Apache-2.0
"""The adapter of a model: a vision-language family, or an image encoder alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from visprune.backbones.encoders import REFUSED
from visprune.catalog import adapters, encoders, list_models
from visprune.errors import UnsupportedModel


def unwrap(model: Any) -> Any:
    """Return the model inside PEFT, DataParallel, compile, open_clip or timm feature wrappers."""
    while True:
        if _is_a(model, "open_clip.TimmModel"):
            model = model.trunk
        elif _is_a(model, "timm.FeatureGetterNet"):
            model = model.model
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _lineage(model: Any) -> list[str]:
    """Library and name of a model's class and its bases, ``"timm.VisionTransformer"``."""
    return [f"{c.__module__.partition('.')[0]}.{c.__qualname__}" for c in type(model).__mro__]


def _is_a(model: Any, name: str) -> bool:
    return name in _lineage(model)


def find_encoder(model: Any) -> Any | None:
    """Return the adapter (a ``EncoderAdapter``) of a vision transformer, ``None`` for other models.

    Raises:
        UnsupportedModel: an image model of timm or open_clip that is not reduced; says why.
    """
    inner = unwrap(model)
    lineage = _lineage(inner) if isinstance(inner, nn.Module) else []
    for name in lineage:
        if name in encoders:
            return encoders.get(name)(inner)
    have = f"Vision transformers with an adapter: {', '.join(list_models('vit'))}."
    for name in lineage:
        if name in REFUSED:
            raise UnsupportedModel(
                f"{type(inner).__name__} is not reduced: {REFUSED[name]}. {have}"
            )
    if _is_a(inner, "open_clip.CLIP") or _is_a(inner, "open_clip.CustomTextCLIP"):
        raise UnsupportedModel(
            f"{type(inner).__name__} holds an image and a text tower; prune its image tower: "
            f"visprune.prune(model.visual, ...)."
        )
    if any(name.partition(".")[0] in ("timm", "open_clip") for name in lineage):
        raise UnsupportedModel(
            f"{type(inner).__name__} is not a plain vision transformer: its layers need the whole "
            f"grid of tokens, or are not known. {have}"
        )
    return None


def find_adapter(model: Any) -> Any:
    """Return the adapter (a ``VLMAdapter``) of ``model``.

    Raises:
        UnsupportedModel: it is not a vision-language model with an adapter; says which have one.
    """
    inner = unwrap(model)
    have = f"Families with an adapter: {', '.join(list_models())}."
    if not isinstance(inner, nn.Module):
        raise UnsupportedModel(f"prune takes a model, got {type(model).__name__}. {have}")
    config = getattr(inner, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise UnsupportedModel(
            f"{type(inner).__name__} is neither a transformers vision-language model nor a vision "
            f"transformer with an adapter. {have} Vision transformers with one: "
            f"{', '.join(list_models('vit'))}."
        )
    if kind in adapters and hasattr(inner, "get_output_embeddings") and hasattr(inner, "model"):
        return adapters.get(kind)(inner)
    if getattr(config, "vision_config", None) is None:
        if getattr(inner, "main_input_name", "") == "pixel_values":
            raise UnsupportedModel(
                f"{type(inner).__name__} ({kind}) takes pictures alone, and has no adapter. Vision "
                f"transformers with one: {', '.join(list_models('vit'))}; families of "
                f"vision-language models: {', '.join(list_models())}. Take an encoder or a family "
                f"of those; many others are in timm as a VisionTransformer or Eva."
            )
        raise UnsupportedModel(
            f"{type(inner).__name__} ({kind}) is a text-only model: there are no visual tokens to "
            f"prune. {have}"
        )
    raise UnsupportedModel(
        f"{type(inner).__name__} ({kind}) has no adapter, or is not the "
        f"...ForConditionalGeneration class. {have}"
    )
