# SPDX-License-Identifier: Apache-2.0
"""The adapter of a model: a vision-language family, or an image encoder alone."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import nn

from visprune.backbones.encoders import AROUND, AROUND_OTHER, REFUSED, TIMM_AROUND
from visprune.backbones.vlm import REFUSED as REFUSED_FAMILIES
from visprune.backbones.vlm.generic import TriedAdapter
from visprune.backbones.vlm.known import lacking
from visprune.catalog import adapters, encoders, model_names
from visprune.errors import UnsupportedModel

# In the names of what a transformers model's forward takes.
_FEATURES = "get_image_features"
_PICTURES, _SOUNDS = ("pixel", "image"), ("input_features", "input_values", "audio")


def unwrap(model: Any) -> Any:
    """Return the model inside PEFT, DataParallel, compile, open_clip or timm feature wrappers."""
    while True:
        if _is_a(model, "open_clip.TimmModel"):
            model = model.trunk
        elif _is_a(model, "timm.FeatureGetterNet"):
            model = model.model
        elif _is_a(model, "transformers.TimmWrapperPreTrainedModel"):
            model = model.timm_model
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
    around = _around(inner, lineage)
    if around is not None:
        return around
    have = _encoders_there_are()
    for name in lineage:
        if name in REFUSED:
            raise UnsupportedModel(
                f"{type(inner).__name__} is not reduced: {REFUSED[name]}. {have}"
            )
    of_open_clip = any(name.startswith("open_clip.") for name in lineage)
    if of_open_clip and isinstance(getattr(inner, "visual", None), nn.Module):
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


def _around(model: Any, lineage: list[str]) -> Any | None:
    """The adapter of the encoder inside a model that classifies or compares."""
    for name in lineage:
        if name in TIMM_AROUND:
            inner = model.get_submodule(TIMM_AROUND[name])
            return encoders.get(next(n for n in _lineage(inner) if n in encoders))(inner, model)
        library, _, kind = name.partition(".")
        if library == "transformers" and kind in AROUND:
            path, mean = AROUND[kind]
            adapter = encoders.get(AROUND_OTHER.get(kind, "transformers.ViTModel"))
            return adapter(unwrap(model.get_submodule(path)), model, mean=mean)
    return None


def _encoders_there_are() -> str:
    names = model_names("vit")
    bare = ", ".join(name.removeprefix("transformers.") for name in names)
    return f"Vision transformers with an adapter: {bare}."


def find_adapter(model: Any) -> Any:
    """Return the adapter (a ``VLMAdapter``) of ``model``.

    Raises:
        UnsupportedModel: it is not a vision-language model with an adapter; says which have one.
    """
    inner = unwrap(model)
    have = f"Families with an adapter: {', '.join(model_names())}."
    if not isinstance(inner, nn.Module):
        raise UnsupportedModel(f"prune takes a model, got {type(model).__name__}. {have}")
    config = getattr(inner, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise UnsupportedModel(
            f"{type(inner).__name__} is neither a transformers vision-language model nor a vision "
            f"transformer with an adapter. {have} {_encoders_there_are()}"
        )
    # An inner model has the same config and a decoder, but writes nothing.
    writes = bool(getattr(inner, "can_generate", lambda: False)())
    why = lacking(kind)
    if why:
        raise UnsupportedModel(f"{type(inner).__name__} ({kind}) is not pruned: {why}. {have}")
    if kind in adapters and writes and hasattr(inner, "get_output_embeddings"):
        return adapters.get(kind)(inner)
    if kind not in adapters and kind not in REFUSED_FAMILIES and _reads_pictures(inner):
        return _tried(inner, kind, have)
    raise UnsupportedModel(f"{type(inner).__name__} ({kind}) {_what_it_is(inner, kind, have)}")


def _reads_pictures(model: nn.Module) -> bool:
    """Whether a model generates text of pictures whose features an inner model merges into it."""
    core = getattr(model, "model", None)
    writes = bool(getattr(model, "can_generate", lambda: False)())
    return writes and hasattr(model, "get_output_embeddings") and hasattr(core, _FEATURES)


def _tried(model: nn.Module, kind: str, have: str) -> Any:
    """The generic adapter on a family that is not known, with a word of warning.

    Raises:
        UnsupportedModel: it cannot be tried.
    """
    try:
        adapter = TriedAdapter(model)
    except (UnsupportedModel, AttributeError) as error:
        raise UnsupportedModel(
            f"{type(model).__name__} ({kind}) has no adapter, and the generic one does not fit it: "
            f"{error} {have}"
        ) from error
    warnings.warn(
        f"{kind} is no family that visprune was proved on. It is tried with the generic adapter: "
        f"the first prompt with a picture is checked (keep all = untouched, drop = hide, cached = "
        f"one forward) before it is pruned, which takes some forwards more. What its encoder makes "
        f"one entry of (a tile, too) counts as one picture.",
        UserWarning,
        stacklevel=4,
    )
    return adapter


def _what_it_is(model: nn.Module, kind: str, have: str) -> str:
    """Why a transformers model has no adapter, after its name, and what to take instead."""
    if kind in REFUSED_FAMILIES:
        return f"is not pruned: {REFUSED_FAMILIES[kind]}. {have}"
    takes = list(inspect.signature(model.forward).parameters)
    pictures = [name for name in takes if any(word in name for word in _PICTURES)]
    sounds = [name for name in takes if any(word in name for word in _SOUNDS)]
    writes = bool(getattr(model, "can_generate", lambda: False)())
    if pictures and not writes:
        path = _encoder_inside(model)
        # What merges pictures into a text takes that as `inputs_embeds`: the inside of a VLM.
        if path is not None and "inputs_embeds" not in takes:
            return (
                f"is a model around an image encoder, which is what is pruned: "
                f"visprune.prune(model.{path}, ...). Whatever reads the encoder's tokens one by "
                f"one, or their plain mean, then reads those that are left."
            )
        if "input_ids" not in takes:
            return (
                f"takes pictures alone, and has no adapter. {_encoders_there_are()} {have} "
                f"Take an encoder or a family of those; many others are in timm as a "
                f"VisionTransformer or Eva."
            )
        return (
            f"takes pictures ({', '.join(pictures)}) and generates no text, and has no adapter, "
            f"or is not the ...ForConditionalGeneration class. {have}"
        )
    if pictures or getattr(getattr(model, "config", None), "vision_config", None) is not None:
        return (
            f"takes pictures ({', '.join(pictures) or 'vision_config'}) and has no adapter: "
            f"whether a dropped token is a hidden one in this family has not been proved. {have}"
        )
    if sounds:
        return f"takes sound ({', '.join(sounds)}) and no pictures. {have}"
    return f"is a text-only model: there are no visual tokens to prune. {have}"


def _encoder_inside(model: nn.Module) -> str | None:
    """Path of the first image encoder with an adapter in a model."""
    for path, part in model.named_modules():
        if path and any(name in encoders for name in _lineage(part)):
            return path
    return None
