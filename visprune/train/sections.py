# SPDX-License-Identifier: Apache-2.0
"""Recipes are dataclasses: built from YAML with every key and type checked, and compared."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from visprune.errors import ConfigError, did_you_mean

__all__ = ["build_section", "changed_keys", "known_name"]


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what two recipes differ in."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(prefix + key)
    return found


def build_section(cls: type, values: Any, where: str) -> Any:
    """Build a dataclass, and the ones inside it, from a mapping.

    Args:
        cls: The dataclass; its annotations say what is allowed.
        values: What YAML gave.
        where: What to call it in messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value is of another type.
    """
    types_of = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping with keys among {', '.join(names)}.")
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
    try:
        return cls(**built)
    except TypeError as error:  # a required key is missing; the names are in the message
        raise ConfigError(f"{where}: {str(error).partition('() ')[2]}.") from error


def _section(kind: Any) -> type | None:
    """The dataclass in a type such as ``EmaConfig | None``, if there is one."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((o for o in options if isinstance(o, type) and is_dataclass(o)), None)


def _plain(kind: Any, value: Any, where: str) -> Any:
    """Check a plain value's type; whole numbers pass as floats, and ``1e-3`` as YAML reads it."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    options = tuple(typing.get_origin(option) or option for option in options)
    if float in options and not isinstance(value, bool):
        if isinstance(value, int):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 (without a point) as a string
            try:
                return float(value)
            except ValueError:
                pass
    if not isinstance(value, options) or (isinstance(value, bool) and bool not in options):
        allowed = " or ".join("null" if o is type(None) else o.__name__ for o in options)
        raise ConfigError(f"{where} is {value!r}; it must be {allowed}.")
    return value


def known_name(given: str, allowed: Sequence[str], what: str) -> None:
    """Refuse a name that is not on a list.

    Raises:
        ConfigError: It is not; the message suggests the nearest.
    """
    if given not in allowed:
        raise ConfigError(
            f"{what} is {given!r}.{did_you_mean(given, allowed)} Allowed: {', '.join(allowed)}."
        )
