# SPDX-License-Identifier: Apache-2.0
"""What was made of pictures and will be asked for again, within a bound of memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Held"]

T = TypeVar("T")


class Held(Generic[T]):
    """Values by key, as many as fit; the others are made anew each time.

    Nothing is thrown out for something newer: whoever goes round the same pictures again and again
    would always find the one it needs next thrown out. :meth:`forget` makes room instead.

    Args:
        room: bytes.
        size: bytes of a value.
    """

    def __init__(self, room: int, size: Callable[[T], int]) -> None:
        self._room, self._size = room, size
        self._held: dict[Hashable, T] = {}
        self._used = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what is held under a key; make it, and hold it where it fits, if nothing is."""
        if key in self._held:
            return self._held[key]
        made = make()
        size = self._size(made)
        if self._used + size <= self._room:
            self._held[key] = made
            self._used += size
        return made

    def forget(self) -> None:
        """Drop everything."""
        self._held.clear()
        self._used = 0

    def __len__(self) -> int:
        return len(self._held)
