# SPDX-License-Identifier: Apache-2.0
"""The metric of any task: its own parse rules and score, summed over processes."""

from __future__ import annotations

from typing import Any

from visprune.eval.metrics.base import AnswerMetric

__all__ = ["TaskMetric"]


class TaskMetric(AnswerMetric):
    """Mean of a task's own score, in percent; references are the task's samples.

    Args:
        task: a :class:`visprune.eval.tasks.base.Task`.
    """

    def __init__(self, task: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = task

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return the task's score."""
        return self.task.score(reference, self.task.parse(prediction, reference))

    def is_parsed(self, prediction: str, reference: Any) -> bool:
        """Return whether a parse rule found an answer."""
        return self.task.parse(prediction, reference).answer is not None
