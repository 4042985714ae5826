# SPDX-License-Identifier: Apache-2.0
"""What is reached without looking: the commonest reference answer of each kind."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from visprune.eval.report.estimate import Scorer
from visprune.eval.report.results import Line
from visprune.eval.tasks.base import Parsed, Sample, SampleError

if TYPE_CHECKING:
    from visprune.eval.tasks.base import Task

__all__ = ["majority_floor"]


def majority_floor(scorer: Scorer, lines: Sequence[Line]) -> float | None:
    """Return the score of always giving the commonest reference of a sample's kind.

    The commonest is taken from the very samples that are scored, so it is a little above what
    somebody who knows only the training set reaches; above it a model has seen something.

    Args:
        scorer: of the task.
        lines: one of each sample.

    Returns:
        The score in the task's unit; ``None`` where samples have no references.
    """
    counts: dict[str, Counter[str]] = {}
    for line in lines:
        counts.setdefault(line.kind, Counter()).update(line.answers)
    common = {kind: found.most_common(1)[0][0] for kind, found in counts.items() if found}
    answered = []
    for line in lines:
        if (said := common.get(line.kind)) is not None:
            score = _score(scorer.task, line, said)
            answered.append(
                dataclasses.replace(line, answer=said, text=said, error=None, score=score)
            )
    return scorer.figures(answered).get("score") if answered else None


def _score(task: Task | None, line: Line, answer: str) -> float:
    if task is None:
        return float(answer in line.answers)
    sample = Sample(
        id=line.sample, question="", image=_no_picture, answers=line.answers,
        choices=line.choices, kind=line.kind, cluster=line.cluster, meta=line.meta,
    )  # fmt: skip
    return task.score(sample, Parsed(answer, "majority"))


def _no_picture() -> Image.Image:
    raise SampleError("A floor is computed without pictures.")
