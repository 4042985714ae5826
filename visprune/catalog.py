# SPDX-License-Identifier: Apache-2.0
"""What there is: methods by name, model families by name. Listing them imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from visprune.backbones.encoders import TABLE as ENCODERS
from visprune.backbones.vlm import TABLE as ADAPTERS
from visprune.core.checked import check_parameters
from visprune.core.numeric import plain
from visprune.core.registry import Registry
from visprune.errors import ConfigError
from visprune.methods import LABELS
from visprune.methods import TABLE as METHODS

if TYPE_CHECKING:
    from visprune.core.method import PruningMethod

methods = Registry("method", METHODS, group="visprune.methods")
adapters = Registry("model family", ADAPTERS, group="visprune.adapters")
encoders = Registry("vision transformer", ENCODERS, group="visprune.encoders")


def labels() -> dict[str, str]:
    """Of methods whose number of tokens is not what a decoder layer sees: what it is."""
    return dict(LABELS)


def list_methods() -> list[str]:
    """Names that :func:`visprune.prune` takes."""
    return list(methods.names())


def model_names(kind: Literal["vlm", "vit"] = "vlm") -> list[str]:
    """Model families that have an adapter.

    Args:
        kind: ``"vlm"``: vision-language models, by ``config.model_type``; ``"vit"``: vision
            transformers, by library and class.
    """
    return list((encoders if kind == "vit" else adapters).names())


def check_method(name: str) -> None:
    """Raise ``ConfigError`` of a name that :func:`get_method` does not know, importing nothing."""
    for part in name.split("+"):
        methods.check(part)


def parameters(name: str) -> set[str]:
    """Names of the parameters of a method, or of the members of ``"a+b"`` together."""
    kinds = [methods.get(part) for part in name.split("+")]
    found = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    dotted = {f"{kind.name}.{f.name}" for kind in kinds for f in dataclasses.fields(kind)}
    return found | dotted if len(kinds) > 1 else found


def get_method(
    method: str | PruningMethod | Sequence[str | PruningMethod], **params: Any
) -> PruningMethod:
    """Build a method from its name and parameters, or return one that is already built.

    Several, in a list or as ``"todre+fastv"``, are one whose stages run in order of depth
    (:mod:`visprune.core.chain`). Behind such a name ``**{"fastv.layer": 3}`` is for one member;
    ``num_keep`` is what is left in the end.

    Raises:
        ConfigError: unknown name or parameter (with a suggestion), or a value of another type or
            out of range; members of a chain that do not go together.
    """
    from visprune.core.method import PruningMethod  # PyTorch: not for a list of names

    if isinstance(method, list | tuple):
        return _chain([get_method(member) for member in method], params)
    if isinstance(method, str) and "+" in method:
        return _named_chain(method, params)
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


def _named_chain(text: str, params: dict[str, Any]) -> PruningMethod:
    """The chain ``"a+b"``, from options or from what its ``to_dict`` gave."""
    from visprune.core.chain import split_options

    names = text.split("+")
    if "members" in params:
        stored = [dict(member) for member in params.pop("members")]
        return _chain([get_method(m.pop("method"), **m) for m in stored], params)
    own, whole = split_options([methods.get(name) for name in names], params)
    built = [get_method(name, **options) for name, options in zip(names, own, strict=True)]
    return _chain(built, whole)


def _chain(members: list[PruningMethod], params: dict[str, Any]) -> PruningMethod:
    from visprune.core.chain import Chain

    chain = Chain.from_params(members=tuple(members), **params)
    check_parameters(Chain, params)
    return chain
