# SPDX-License-Identifier: Apache-2.0
"""Intervals of a score and of a paired difference: a bootstrap over pictures, drawn once.

Questions about one picture share its luck, so whole pictures are drawn. All arms of a task see the
same draws; the interval of a difference is that of the replicates of the arm minus those of the
untouched model. For a mean over samples this is :func:`visprune.eval.stats.paired_bootstrap`, done
for many columns in one product; figures that are no mean (F1, MME's acc+) are computed anew on
every draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visprune.errors import ConfigError
from visprune.eval.report.read import Line, canonical
from visprune.eval.stats import wilson
from visprune.eval.tasks.base import Task, get_task

__all__ = ["Draws", "Scorer", "interval"]

CONFIDENCE = 0.95
_RESAMPLES, _RESAMPLES_SLOW = 2000, 200
_CHUNK = 64  # draws in one product: 100,000 pictures then take 26 MB of float32


class Draws:
    """How often each picture is drawn in each replicate.

    Args:
        clusters: the pictures.
        resamples: replicates, R.
        seed: of the draws.
    """

    def __init__(
        self, clusters: Sequence[str], *, resamples: int = _RESAMPLES, seed: int = 0
    ) -> None:
        self.index = {name: i for i, name in enumerate(sorted(set(clusters)))}
        total = len(self.index)
        random = np.random.default_rng(seed)
        # One byte: n draws of n hold no picture more than n times, and for n > 255 the chance of
        # 256 times the same one is below 1/256!.
        self.counts = np.empty((resamples, total), np.uint8)  # [R, C]
        for row in self.counts:
            row[:] = np.bincount(random.integers(total, size=total), minlength=total)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the column sums of ``values`` ``[C, m]`` under every draw, ``[R, m]``."""
        chunks = range(0, len(self.counts), _CHUNK)
        columns = values.astype(np.float32)
        return np.concatenate(
            [self.counts[at : at + _CHUNK].astype(np.float32) @ columns for at in chunks]
        )


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval; replicates that hold no sample are left out."""
    kept = replicates[np.isfinite(replicates)]
    if not len(kept):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return float(low), float(high)


class Scorer:
    """The score of a task from lines alone, and its replicates.

    Args:
        about: ``task.to_dict()`` of a cell.
        draws: of the pictures of the task.
        lines: of one run, to find out whether the score is a mean over samples.
    """

    def __init__(self, about: Mapping[str, Any], draws: Draws, lines: Sequence[Line]) -> None:
        self.draws = draws
        self.task, self.problem = _build(about)
        self.mean = self.task is None or type(self.task).aggregate is Task.aggregate
        # Top-1 and Acc@0.5 come with figures of their own, and are means all the same.
        self.mean = self.mean or all(
            map(self._is_mean, (lines, lines[::3], lines[: len(lines) // 2]))
        )

    def _is_mean(self, lines: Sequence[Line]) -> bool:
        scores = [line.score for line in lines if line.score is not None]
        found = self.figures(lines).get("score")
        if not scores or found is None:
            return False
        return abs(found - 100 * float(np.mean(scores))) < 1e-9

    def figures(self, lines: Sequence[Line], *, errors_count: bool = False) -> dict[str, float]:
        """Return the task's figures, ``"score"`` first; empty where nothing was scored."""
        if self.task is not None:
            found = self.task.aggregate(lines, errors_count_as_wrong=errors_count)
            return {str(name): float(value) for name, value in found.items()}
        scores = [line.score or 0.0 for line in lines if errors_count or line.score is not None]
        return {"score": 100.0 * float(np.mean(scores))} if scores else {}

    def replicates(self, lines: Sequence[Line]) -> np.ndarray:
        """Return the score of ``lines`` under every draw: ``[R]``, or fewer where it is no mean."""
        if self.mean:
            totals = self.totals([(line.cluster, line.score) for line in lines])
            return ratio(self.draws.sums(totals))[:, 0]
        groups: dict[str, list[Line]] = {}
        for line in lines:
            groups.setdefault(line.cluster, []).append(line)
        found = [
            self.figures(_drawn(groups, self.draws.index, counts)).get("score", float("nan"))
            for counts in self.draws.counts[:_RESAMPLES_SLOW]
        ]
        return np.asarray(found)

    def totals(self, values: Sequence[tuple[str, float | None]]) -> np.ndarray:
        """Return sums (in percent) and counts per picture of (picture, value) pairs: ``[C, 2]``."""
        known = [(self.draws.index[name], value) for name, value in values if value is not None]
        member = np.asarray([number for number, _ in known], np.int64)
        weight = np.asarray([100.0 * value for _, value in known], np.float64)
        size = len(self.draws.index)
        return np.stack(
            [np.bincount(member, weight, size), np.bincount(member, minlength=size)], axis=1
        )

    def interval(self, lines: Sequence[Line], replicates: np.ndarray) -> tuple[float, float]:
        """Return the interval of the score; Wilson's where all answers are right, or all wrong.

        The bootstrap then draws the same value again and again and claims to know it exactly.
        """
        scores = {line.score for line in lines} - {None}
        if self.mean and scores in ({0.0}, {1.0}):
            pictures = len({line.cluster for line in lines if line.score is not None})
            low, high = wilson(pictures if scores == {1.0} else 0, pictures)
            return 100 * low, 100 * high
        return self.ends(lines, replicates)

    def ends(self, lines: Sequence[Line], replicates: np.ndarray) -> tuple[float, float]:
        """Return the percentile interval; NaN for one picture, which says nothing of others."""
        if len({line.cluster for line in lines if line.score is not None}) < 2:
            return float("nan"), float("nan")
        return interval(replicates)


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return sums over counts of ``[..., 2m]`` columns (sum, count, sum, count ...)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0::2] / sums[..., 1::2]


def _build(about: Mapping[str, Any]) -> tuple[Task | None, str]:
    """Build the task of a cell again, or say why the plain mean has to do."""
    options = {key: value for key, value in about.items() if key not in ("task", "version")}
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    try:
        task = get_task(str(about.get("task")), **options)
    except (ConfigError, TypeError) as error:
        return None, f"The score is the mean over samples: {error}"
    if about.get("version") not in (None, task.VERSION):
        return None, (
            f"The score is the mean over samples: the records are of version "
            f"{about.get('version')} of {task.name}, this visprune has {task.VERSION}."
        )
    same = canonical(task.to_dict()) == canonical(about)
    return task, "" if same else f"The options of {task.name} changed since: {canonical(about)}."


def _drawn(
    groups: Mapping[str, Sequence[Line]], index: Mapping[str, int], counts: np.ndarray
) -> list[Line]:
    """Return the lines of the drawn pictures; a picture drawn twice is two pictures."""
    drawn: list[Line] = []
    for cluster, lines in groups.items():
        for copy in range(int(counts[index[cluster]])):
            drawn += lines if copy == 0 else [_renamed(line, copy) for line in lines]
    return drawn


def _renamed(line: Line, copy: int) -> Line:
    return dataclasses.replace(
        line, sample=f"{line.sample}#{copy}", cluster=f"{line.cluster}#{copy}"
    )
