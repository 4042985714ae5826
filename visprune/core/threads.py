# SPDX-License-Identifier: Apache-2.0
"""What belongs to a call of one thread."""

from __future__ import annotations

import inspect
import threading
from typing import Any, Self


class PerThread(threading.local):
    """Base of what the hooks of one model hand to each other within a call, thread by thread.

    Attributes are annotated in the class with what a thread starts with, which is never written to.
    A copy of a model starts without: copies and pickles of an instance are new ones.
    """

    def __init__(self) -> None:
        """Runs in each thread, at its first use: every attribute is then the instance's own.

        One that is the class's until it is first set makes compiled code rely on its absence, and
        TorchDynamo refuses to compile the call again once it is there.
        """
        for kind in type(self).__mro__:
            for name in inspect.get_annotations(kind):
                if hasattr(type(self), name):
                    vars(self).setdefault(name, getattr(type(self), name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
