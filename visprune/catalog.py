# SPDX-License-Identifier: Apache-2.0
"""What there is: methods by name, model families by name. Listing them imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from visprune.backbones.towers import REFUSED
from visprune.backbones.towers import TABLE as TOWERS
from visprune.backbones.vlm import TABLE as ADAPTERS
from visprune.budget import is_number
from visprune.errors import ConfigError, UnsupportedModel
from visprune.method import PruningMethod
from visprune.methods import TABLE as METHODS
from visprune.registry import Registry

methods = Registry("method", METHODS, group="visprune.methods")
adapters = Registry("model family", ADAPTERS, group="visprune.adapters")
towers = Registry("vision transformer", TOWERS, group="visprune.towers")


def list_methods() -> list[str]:
    """Names that :func:`visprune.prune` takes."""
    return list(methods.names())


def list_models(kind: Literal["vlm", "vit"] = "vlm") -> list[str]:
    """Model families that have an adapter.

    Args:
        kind: ``"vlm"``: vision-language models, by ``config.model_type``; ``"vit"``: vision
            transformers, by library and class.
    """
    return list((towers if kind == "vit" else adapters).names())


def get_method(method: str | PruningMethod, **params: Any) -> PruningMethod:
    """Build a method from its name and parameters, or return one that is already built.

    Raises:
        ConfigError: unknown name or parameter (with a suggestion), or a value of another type or
            out of range.
    """
    if isinstance(method, PruningMethod):
        if params:
            raise ConfigError(
                f"{method.name} is already built; set {', '.join(params)} on it, or pass its name."
            )
        _check_types(type(method), vars(method))
        return method
    if not isinstance(method, str):
        raise ConfigError(
            f"A method is a name or a PruningMethod instance, got {type(method).__name__}. "
            f"Names: {', '.join(list_methods())}."
        )
    kind = methods.get(method)
    try:
        built: PruningMethod = kind.from_params(**params)
    except TypeError:  # a range is checked by comparing, which not every type can
        _check_types(kind, params)
        raise
    _check_types(kind, vars(built))
    return built


def _check_types(method: type[PruningMethod], given: Mapping[str, Any]) -> None:
    """Compare the values of a method's parameters with the types that its class declares.

    After the method's own checks, which say more of the values that they look at.

    Raises:
        ConfigError: a value of another type.
    """
    try:
        hints = get_type_hints(method)
    except NameError:  # a method from elsewhere, with names that a type checker alone imports
        return
    for name, value in given.items():
        if not _fits(value, hints.get(name, Any)):
            raise ConfigError(
                f"{method.name} takes no {name}={value!r}: give {_named(hints[name])}."
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; of types that no method of ours declares, yes."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (list, tuple, Sequence) and parts[1:] in ((), (...,)):
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    if hint in (int, float):
        return is_number(value) and (hint is float or isinstance(value, int))
    return hint not in _NAMED or isinstance(value, hint)


_NAMED = {int: "an int", float: "a number", bool: "True or False", NoneType: "None"}


def _named(hint: Any) -> str:
    """A type in words, after "give"."""
    parts = get_args(hint)
    if get_origin(hint) in (list, tuple, Sequence):
        return f"a list, each {_named(parts[0])}"
    if get_origin(hint) is Literal:
        return " or ".join(repr(part) for part in parts)
    if hint == int | float:
        return "an int or a fraction"
    return " or ".join(_named(part) for part in parts) if parts else _NAMED[hint]


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


def find_tower(model: Any) -> Any | None:
    """Return the adapter (a ``TowerAdapter``) of a vision transformer, ``None`` for other models.

    Raises:
        UnsupportedModel: an image model of timm or open_clip that is not reduced; says why.
    """
    inner = unwrap(model)
    lineage = _lineage(inner) if isinstance(inner, nn.Module) else []
    for name in lineage:
        if name in towers:
            return towers.get(name)(inner)
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
