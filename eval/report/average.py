# SPDX-License-Identifier: Apache-2.0
"""One number over all tasks, as the field's tables have it: the mean of relative scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visprune.eval.report.efficiency import AXES
from visprune.eval.report.estimate import interval
from visprune.eval.report.front import on_front
from visprune.eval.report.rows import Arm, Row, Table

__all__ = ["averages"]


def averages(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Return one entry per arm that ran on every task of its model: score in % of the untouched.

    Every task counts the same, whatever its size. The interval joins the replicates of the tasks,
    whose pictures are drawn apart. A task on which the untouched model scores 0 has no relative
    score; then there is no average.

    Args:
        tables: of one model.

    Returns:
        ``{"arm", "score", "delta", "cost", "pareto"}``, cost as the mean over tasks on each axis;
        empty for fewer than two tasks.
    """
    if len(tables) < 2:
        return []
    by_arm: dict[Arm, list[Row]] = {}
    for table in tables:
        for row in table.rows:
            by_arm.setdefault(row.arm, []).append(row)
    found = [
        entry
        for arm, rows in by_arm.items()
        if len(rows) == len(tables) and (entry := _entry(arm, rows, tables)) is not None
    ]
    if len(found) < 2:  # of the untouched model alone there is nothing to say
        return []
    for entry in found:
        entry["pareto"] = [axis for axis in AXES if _on_front(entry, found, axis)]
    return found


def _entry(arm: Arm, rows: Sequence[Row], tables: Sequence[Table]) -> dict[str, Any] | None:
    """The average of one arm; ``None`` where a task has no relative score."""
    draws = [row.relative for row in rows if row.relative is not None]
    points = [_relative(row, table) for row, table in zip(rows, tables, strict=True)]
    known = [point for point in points if point is not None]
    if len(draws) < len(rows) or len(known) < len(rows):
        return None
    shortest = min(map(len, draws))
    value = float(np.mean(known))
    low, high = interval(np.mean([values[:shortest] for values in draws], axis=0))
    cost: dict[str, float | None] = {}
    for axis in AXES:
        values = [paid for row in rows if (paid := row.cost.on(axis)) is not None]
        cost[axis] = float(np.mean(values)) if len(values) == len(rows) else None
    delta = None if arm.untouched else (value - 100, low - 100, high - 100)
    return {"arm": arm, "score": (value, low, high), "delta": delta, "cost": cost}


def _on_front(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], axis: str) -> bool:
    points = [(r["cost"][axis], r["score"][0]) for r in rows if r["cost"][axis] is not None]
    return row["cost"][axis] is not None and on_front((row["cost"][axis], row["score"][0]), points)


def _relative(row: Row, table: Table) -> float | None:
    """Score in percent of the untouched model's on the same samples."""
    if row.arm.untouched:
        return 100.0
    if row.score is None or row.delta is None:
        return None
    base = next((r.score for r in table.rows if r.arm.untouched and r.score is not None), None)
    return 100.0 * (base[0] + row.delta[0]) / base[0] if base and base[0] else None
