# SPDX-License-Identifier: Apache-2.0
"""The most memory that something takes: of a GPU's allocator, or of this process under Linux."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

__all__ = ["Peak"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The most that is held from here on, less what is held already.

    On the CPU it is the resident size of the process, which holds what else it does meanwhile;
    freed memory is handed back to the system first, so that it cannot be taken again unseen.

    Args:
        device: where tensors are.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _resident("VmRSS") if _forget() else None
        self._device = device

    @property
    def nbytes(self) -> int | None:
        """Bytes; ``None`` where the system does not tell."""
        if self._before is None:
            return None
        most = torch.cuda.max_memory_allocated(self._device) if self._cuda else _resident("VmHWM")
        return None if most is None else most - self._before


def _forget() -> bool:
    """Hand freed memory back, and let the system count the most that is held anew."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    """A size of ``/proc/self/status`` in bytes."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
