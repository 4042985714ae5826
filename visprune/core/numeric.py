# SPDX-License-Identifier: Apache-2.0
"""What counts as a number: Python's own, and those of NumPy and others that announce themselves."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = ["is_number", "is_whole", "plain"]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer (``np.int64`` too), and not ``True`` or ``False``."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a real number (``np.float32`` too), and not ``True`` or ``False``."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """The number as Python's own, which is what JSON and the checks of types know.

    Args:
        value: Anything; numbers inside lists and tuples are made plain too, all else stays.
    """
    if type(value) in (bool, int, float, str):
        return value
    if is_whole(value):
        return int(value)
    if is_number(value):
        return float(value)
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    return value
