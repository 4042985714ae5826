# SPDX-License-Identifier: Apache-2.0
"""One model, many threads: when a run may be taken off."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Gate:
    """Counts the calls that are under way, so that a run is not taken off in their midst."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return Gate()

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, ()

    def enter(self) -> None:
        """A call of this thread begins; waits while the run is being taken off."""
        with self._changed:
            self._inside[threading.get_ident()] += 1

    def leave(self) -> None:
        """It is over, by an error too."""
        with self._changed:
            me = threading.get_ident()
            self._inside[me] = max(0, self._inside[me] - 1)  # another's hook failed before ours ran
            self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Wait for the calls of other threads, and let none begin in the meantime."""
        with self._changed:
            me = threading.get_ident()
            self._changed.wait_for(
                lambda: all(count <= 0 for who, count in self._inside.items() if who != me)
            )
            yield
