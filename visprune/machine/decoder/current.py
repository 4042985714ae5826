# SPDX-License-Identifier: Apache-2.0
"""What the hooks of one call of a vision-language model hand to each other."""

from __future__ import annotations

from typing import Any

from visprune.core.threads import PerThread
from visprune.core.trace import Trace
from visprune.machine.decoder.forward import Forward


class Current(PerThread):
    """The call that a thread is in.

    Attributes:
        call: the arguments of the core, until the decoder is entered.
        forward: the call of the decoder that is under way.
        trace: of the last forward of this thread that held pictures.
    """

    call: dict[str, Any] | None = None
    forward: Forward | None = None
    trace: Trace | None = None

    def under_way(self) -> Forward | None:
        """The call of the decoder that is under way, unless it only looks ahead."""
        return None if self.forward is None or self.forward.ahead else self.forward
