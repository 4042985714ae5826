# SPDX-License-Identifier: Apache-2.0
"""What there is: methods by name, model families by name. Listing them imports nothing heavy."""

from __future__ import annotations

from typing import Any

from visprune.backbones.vlm import TABLE as ADAPTERS
from visprune.errors import ConfigError
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
