# SPDX-License-Identifier: Apache-2.0
"""What a study shows while it runs: bars with the time left, and a line per finished cell."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console

__all__ = ["Progress", "Silent"]


class Silent:
    """Shows nothing; the interface of :class:`Progress`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def plan(self, total: int, done: int) -> None:
        """Samples of the study that are known so far, and how many have a record."""

    def cell(self, text: str, total: int, done: int) -> None:
        """A cell begins."""

    def advance(self, count: int) -> None:
        """Samples were answered, here or elsewhere."""

    def step(self) -> None:
        """The cell went on by something that is no sample, such as a timed run."""

    def note(self, text: str) -> None:
        """Say one line."""


class Progress(Silent):
    """Two bars: the study and the cell at work.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<34}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            speed_estimate_period=120,
        )
        self._all = self._bars.add_task("samples", total=None)
        self._cell = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.update(self._cell, visible=False)
        self._bars.stop()

    def plan(self, total: int, done: int) -> None:
        """Samples of the study that are known so far, and how many have a record."""
        self._bars.update(self._all, total=total, completed=done)

    def cell(self, text: str, total: int, done: int) -> None:
        """A cell begins."""
        self._bars.reset(self._cell, description=text, total=total, completed=done, visible=True)

    def advance(self, count: int) -> None:
        """Samples were answered, here or elsewhere."""
        self._bars.advance(self._all, count)
        self._bars.advance(self._cell, count)

    def step(self) -> None:
        """The cell went on by something that is no sample, such as a timed run."""
        self._bars.advance(self._cell, 1)

    def note(self, text: str) -> None:
        """Say one line."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
