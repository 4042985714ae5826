# SPDX-License-Identifier: Apache-2.0
"""What belongs to a call of one thread."""

from __future__ import annotations

import threading
from typing import Any, Self


class PerThread(threading.local):
    """Base of what the hooks of one model hand to each other within a call, thread by thread.

    A copy of a model starts without: copies and pickles of an instance are new ones.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
