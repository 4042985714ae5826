# SPDX-License-Identifier: Apache-2.0
"""What there is: methods by name, model families by name. Listing them imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from visprune.backbones.encoders import TABLE as ENCODERS
from visprune.backbones.vlm import TABLE as ADAPTERS
from visprune.backbones.vlm.known import KNOWN
from visprune.core.checked import check_parameters
from visprune.core.numeric import plain
from visprune.core.registry import Registry
from visprune.errors import ConfigError
from visprune.methods import TABLE as METHODS

if TYPE_CHECKING:
    from visprune.core.method import PruningMethod

methods = Registry("method", METHODS, group="visprune.methods")
adapters = Registry("model family", ADAPTERS, group="visprune.adapters")
encoders = Registry("vision transformer", ENCODERS, group="visprune.encoders")


def list_methods() -> list[str]:
    """Names that :func:`visprune.prune` takes."""
    return list(methods.names())


def list_models(kind: Literal["vlm", "vit"] = "vlm") -> list[str]:
    """Model families that have an adapter.

    Args:
        kind: ``"vlm"``: vision-language models, by ``config.model_type``; ``"vit"``: vision
            transformers, by library and class.
    """
    return list((encoders if kind == "vit" else adapters).names())


def known_models(family: str) -> str:
    """What users know a family by, and what it takes; empty for one of another package."""
    return "; ".join(KNOWN.get(family, ()))


def get_method(method: str | PruningMethod, **params: Any) -> PruningMethod:
    """Build a method from its name and parameters, or return one that is already built.

    Raises:
        ConfigError: unknown name or parameter (with a suggestion), or a value of another type or
            out of range.
    """
    from visprune.core.method import PruningMethod  # PyTorch: not for a list of names

    if isinstance(method, PruningMethod):
        if params:
            raise ConfigError(
                f"{method.name} is already built; set {', '.join(params)} on it, or pass its name."
            )
        for key, value in vars(method).items():
            object.__setattr__(method, key, plain(value))
        check_parameters(type(method), vars(method))
        return method
    if not isinstance(method, str):
        raise ConfigError(
            f"A method is a name or a PruningMethod instance, got {type(method).__name__}. "
            f"Names: {', '.join(list_methods())}."
        )
    kind, params = methods.get(method), {key: plain(value) for key, value in params.items()}
    try:
        built: PruningMethod = kind.from_params(**params)
    except TypeError:  # a range is checked by comparing, which not every type can
        check_parameters(kind, params)
        raise
    check_parameters(kind, vars(built))
    return built
