# SPDX-License-Identifier: Apache-2.0
"""Recipes are dataclasses: built from YAML as studies are, and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visprune.core.checked import build_section
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


def known_name(given: str, allowed: Sequence[str], what: str) -> None:
    """Refuse a name that is not on a list.

    Raises:
        ConfigError: It is not; the message suggests the nearest.
    """
    if given not in allowed:
        raise ConfigError(
            f"{what} is {given!r}.{did_you_mean(given, allowed)} Allowed: {', '.join(allowed)}."
        )
