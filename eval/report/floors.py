# SPDX-License-Identifier: Apache-2.0
"""What is reached without looking, for a table whose rows pool seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from visprune.eval.metrics.beside import Floors, floors
from visprune.eval.report.read import Line

if TYPE_CHECKING:
    from visprune.eval.tasks.base import Task

__all__ = ["pooled_floors"]


def pooled_floors(task: Task | None, sets: Mapping[str, Sequence[Line]]) -> Floors | None:
    """Return the floors of each seed's questions, in the mean weighted by their number.

    Records have no train split: the floors are counted on the questions asked, see
    :func:`visprune.eval.metrics.beside.floors`.

    Args:
        task: the task; ``None``: it cannot be built, an answer is right if it is a reference.
        sets: the samples of each seed, one line each; what failed in every run is left out.

    Returns:
        The floors; ``None`` for boxes, and where references are not public.
    """
    every = [
        (floors(task, lines), sum(line.error is None for line in lines)) for lines in sets.values()
    ]
    found = [(floor, count) for floor, count in every if floor is not None]
    if not found or len(found) < len(every):
        return None
    weights = [count for _, count in found]

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=weights))

    kinds = [floor.per_kind for floor, _ in found if floor.per_kind is not None]
    return Floors(
        majority=mean([floor.majority for floor, _ in found]),
        majority_answer=" / ".join(dict.fromkeys(floor.majority_answer for floor, _ in found)),
        per_kind=mean(kinds) if len(kinds) == len(found) else None,
        prior=mean([floor.prior for floor, _ in found]),
    )
