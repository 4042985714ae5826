# SPDX-License-Identifier: Apache-2.0
"""What there is: methods by name, model families by name. Listing them imports nothing heavy."""

from __future__ import annotations

from typing import Any

from torch import nn

from visprune.backbones.vlm import TABLE as ADAPTERS
from visprune.errors import ConfigError, UnsupportedModel
from visprune.method import PruningMethod
from visprune.methods import TABLE as METHODS
from visprune.registry import Registry

methods = Registry("method", METHODS, group="visprune.methods")
adapters = Registry("model family", ADAPTERS, group="visprune.adapters")


def list_methods() -> list[str]:
    """Names that :func:`visprune.prune` takes."""
    return list(methods.names())


def list_models() -> list[str]:
    """Model families (``config.model_type``) that have an adapter."""
    return list(adapters.names())


def get_method(method: str | PruningMethod, **params: Any) -> PruningMethod:
    """Build a method from its name and parameters, or return one that is already built.

    Raises:
        ConfigError: unknown name or parameter (with a suggestion), or a value out of range.
    """
    if isinstance(method, PruningMethod):
        if params:
            raise ConfigError(
                f"{method.name} is already built; set {', '.join(params)} on it, or pass its name."
            )
        return method
    if not isinstance(method, str):
        raise ConfigError(
            f"A method is a name or a PruningMethod instance, got {type(method).__name__}. "
            f"Names: {', '.join(list_methods())}."
        )
    return methods.get(method).from_params(**params)


def unwrap(model: Any) -> Any:
    """Return the transformers model inside PEFT, DataParallel or compile wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


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
            f"{type(inner).__name__} is not a transformers vision-language model. {have}"
        )
    if kind in adapters and hasattr(inner, "get_output_embeddings") and hasattr(inner, "model"):
        return adapters.get(kind)(inner)
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModel(
            f"{type(inner).__name__} ({kind}) is a text-only model: there are no visual tokens to "
            f"prune. {have}"
        )
    raise UnsupportedModel(
        f"{type(inner).__name__} ({kind}) has no adapter, or is not the "
        f"...ForConditionalGeneration class. {have}"
    )
