# SPDX-License-Identifier: Apache-2.0
"""Methods, studies and recipes are dataclasses: every key and every type is checked."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from visprune.core.numeric import is_number, is_whole, plain
from visprune.errors import ConfigError, did_you_mean

__all__ = ["build_section", "check_parameters", "check_values"]


def build_section(cls: type, values: Any, where: str) -> Any:
    """Build a dataclass, and the ones inside it, from a mapping.

    Args:
        cls: The dataclass; its annotations say what is allowed.
        values: What YAML gave.
        where: What to call it in messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value is of another type.
    """
    built = check_values(cls, values, where)
    try:
        return cls(**built)
    except TypeError as error:  # a required key is missing; the names are in the message
        raise ConfigError(f"{where}: {str(error).partition('() ')[2]}.") from error


def check_values(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Check some of a dataclass's values, and build the dataclasses inside it.

    Args:
        cls: The dataclass; its annotations say what is allowed.
        values: What YAML gave.
        where: What to call it in messages.

    Returns:
        The values, of the types that the annotations name: where those are tuples, a list becomes
        one, and so does a lone value.

    Raises:
        ConfigError: A key is unknown, or a value is of another type.
    """
    types_of = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where} must be a mapping with keys among {', '.join(names)}; got {values!r}."
        )
    for key in values:
        if key not in names:
            hint = did_you_mean(str(key), names)
            raise ConfigError(f"{where}: unknown key {key!r}.{hint} Allowed: {', '.join(names)}.")
    built = {}
    for key, value in values.items():
        inner = _section(types_of[key])
        if inner is not None and value is not None:
            built[key] = build_section(inner, value, f"{where}, {key}")
        else:
            built[key] = _plain(types_of[key], value, f"{where}: {key}")
    return built


def _section(kind: Any) -> type | None:
    """The dataclass in a type such as ``EmaConfig | None``, if there is one."""
    return next((o for o in _options(kind) if isinstance(o, type) and is_dataclass(o)), None)


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _plain(kind: Any, value: Any, where: str) -> Any:
    """Check a value that YAML gave, read as its type wants it.

    Whole numbers pass as floats, and so does ``1e-3``, which YAML 1.1 reads as text; a list becomes
    a tuple, and so does a lone value.
    """
    value = plain(value)
    options = {typing.get_origin(option) or option: option for option in _options(kind)}
    if float in options:
        value = _number(value)
    if tuple in options and not any(_fits(value, o) for k, o in options.items() if k is not tuple):
        (each, _) = typing.get_args(options[tuple])  # tuple[X, ...]
        several = value if isinstance(value, list | tuple) else [value]
        return tuple(_plain(each, v, f"{where}[{i}]") for i, v in enumerate(several))
    if not _fits(value, kind):
        raise ConfigError(f"{where} is {value!r}; it must be {_named(kind, nothing='null')}.")
    if Mapping in options and isinstance(value, Mapping):
        (_, each) = typing.get_args(options[Mapping])
        return {key: _plain(each, v, f"{where}, {key}") for key, v in value.items()}
    return value


def _number(value: Any) -> Any:
    """A float of what stands for one; anything else as it is."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def check_parameters(method: type[Any], given: Mapping[str, Any]) -> None:
    """Compare the values of a method's parameters with the types that its class declares.

    After the method's own checks, which say more of the values that they look at.

    Raises:
        ConfigError: a value of another type.
    """
    try:
        hints = typing.get_type_hints(method)
    except NameError:  # a method from elsewhere, with names that a type checker alone imports
        return
    for name, value in given.items():
        if not _fits(value, hints.get(name, Any)):
            raise ConfigError(
                f"{method.name} takes no {name}={value!r}: give {_named(hints[name])}."
            )


_NAMED = {int: "an int", float: "a number", bool: "True or False", str: "text"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; of types that nothing of ours declares, yes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (list, tuple, Sequence) and parts[1:] in ((), (...,)):
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    if hint in (int, float):
        return is_number(value) if hint is float else is_whole(value)
    if origin is Mapping or hint in (*_NAMED, types.NoneType):
        return isinstance(value, origin or hint)
    return True


def _named(hint: Any, nothing: str = "None") -> str:
    """A type in words, behind "give" or "must be".

    Args:
        hint: the type.
        nothing: what ``None`` is called where it is written.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple, Sequence):
        return f"a list, each {_named(parts[0], nothing)}"
    if origin is typing.Literal:
        return " or ".join(repr(part) for part in parts)
    if origin is Mapping:
        return "a mapping"
    if hint == int | float:
        return "an int or a fraction"
    if parts:
        return " or ".join(_named(part, nothing) for part in parts)
    return nothing if hint is types.NoneType else _NAMED[hint]
