# SPDX-License-Identifier: Apache-2.0
"""Which rows of a table no other row beats in cost and in score."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["on_front", "pareto"]

from visprune.eval.report.efficiency import AXES
from visprune.eval.report.read import NO_IMAGE
from visprune.eval.report.rows import Row


def pareto(rows: Sequence[Row]) -> None:
    """Mark on every axis the rows that no other beats; without a picture there is no contest."""
    seeing = [row for row in rows if row.arm.method != NO_IMAGE]
    for axis in AXES:
        points = [
            (cost, row.score[0], row)
            for row in seeing if row.score is not None and (cost := row.cost.on(axis)) is not None
        ]  # fmt: skip
        plain = [(cost, score) for cost, score, _ in points]
        for cost, score, row in points:
            if on_front((cost, score), plain):
                row.pareto.append(axis)


def on_front(point: tuple[float, float], points: Sequence[tuple[float, float]]) -> bool:
    """Return whether no other (cost, score) is as good in both and better in one."""
    cost, score = point
    return not any(c <= cost and s >= score and (c < cost or s > score) for c, s in points)
