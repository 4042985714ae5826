# SPDX-License-Identifier: Apache-2.0
"""Cells that no table shows since they have no record: refused, or not asked yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from visprune.eval.records.record import Cell

__all__ = ["NOT_IN_TABLES", "Missing", "missing_cells"]

NOT_IN_TABLES = "Not in the tables"


@dataclass(frozen=True)
class Missing:
    """A method on a task of a model, whose cells have no record.

    Attributes:
        model: name of the model.
        task: name of the task.
        label: what the study calls the method.
        why: the reason it was refused for, or ``"no records yet"``.
        seeds: the seeds of those cells.
    """

    model: str
    task: str
    label: str
    why: str
    seeds: tuple[int, ...]

    @property
    def text(self) -> str:
        """``"fastv 8 on MODEL, TASK: no records yet"``, with the seeds where one is not 0."""
        seeds = f", seed {', '.join(map(str, self.seeds))}" if any(self.seeds) else ""
        return f"{self.label} on {self.model}, {self.task}{seeds}: {self.why}"


def missing_cells(cells: Iterable[Cell]) -> Sequence[Missing]:
    """Return what is missing, cells that differ in their seed alone as one."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for cell in cells:
        name = (str(cell.model.get("name")), str(cell.task.get("task")), cell.label,
                cell.refused or "no records yet")  # fmt: skip
        found.setdefault(name, []).append(cell.seed)
    return [Missing(*name, tuple(sorted(seeds))) for name, seeds in found.items()]
