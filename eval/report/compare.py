# SPDX-License-Identifier: Apache-2.0
"""Compare two runs on the same questions: a paired bootstrap and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visprune.errors import ConfigError
from visprune.eval.records.record import Cell, Record
from visprune.eval.report.estimate import Draws, Scorer
from visprune.eval.report.pairing import (
    by_task,
    labels_of,
    matched,
    opened,
    pairs_of,
    same_folder,
    titled,
)
from visprune.eval.report.read import Line
from visprune.eval.report.rows import pooled
from visprune.eval.stats import PairedDifference, paired_bootstrap

__all__ = ["Comparison", "OwnFigure", "compare", "mcnemar", "to_text"]

_RIGHT = 0.5  # a fractional score counts as right from here on, for McNemar's test alone


@dataclass(frozen=True)
class OwnFigure:
    """The task's own score, where that is no mean over questions (F1, points of MME).

    Attributes:
        name: of the metric.
        unit: ``"%"`` or ``"points"``.
        first: of A on the common questions, mean over seeds.
        second: of B.
        difference: B minus A, with its 95 % interval over pictures.
    """

    name: str
    unit: str
    first: float
    second: float
    difference: PairedDifference


@dataclass(frozen=True)
class Comparison:
    """B against A on one task.

    Attributes:
        task: the task, with what tells it from others of its name.
        first: what A is called.
        second: what B is called.
        samples: questions that both answered.
        pictures: distinct pictures among them.
        left_out: questions that one of them has no answer to (an error, or no record).
        first_score: mean score of A on the common questions, in percent.
        second_score: the same of B.
        difference: B minus A, in percent points, with its 95 % interval over pictures.
        only_first: questions that A alone has right.
        only_second: questions that B alone has right.
        p_value: of McNemar's exact test, two-sided.
        fractional: some scores are neither 0 nor 1; the test counts 0.5 and more as right.
        own: the figure that the tables show, where it is another.
    """

    task: str
    first: str
    second: str
    samples: int
    pictures: int
    left_out: int
    first_score: float
    second_score: float
    difference: PairedDifference
    only_first: int
    only_second: int
    p_value: float
    fractional: bool
    own: OwnFigure | None = None


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    Under the hypothesis that both are equally good, each question that only one of them has right
    falls to either with probability one half; questions on which they agree say nothing.

    Args:
        only_first: questions that the first alone has right.
        only_second: questions that the second alone has right.
    """
    total, least = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    # Terms relative to the largest, so that thousands of questions do not overflow.
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
            for k in range(least + 1)]  # fmt: skip
    top = max(logs)
    tail = math.log(sum(math.exp(x - top) for x in logs)) + top - total * math.log(2.0)
    return min(1.0, 2.0 * math.exp(tail))


def compare(first: str, second: str, *, resamples: int = 10_000) -> list[Comparison]:
    """Compare two runs, task by task, seeds pooled.

    Args:
        first: ``RESULTS`` or ``RESULTS:METHOD``, a results folder and what its tables call a method
            (``"out:todre 64"``).
        second: the same. Where neither names a method, all that both folders have are compared;
            where only one does, the other folder's method of the same name.
        resamples: of the bootstrap.

    Raises:
        ConfigError: no such folder or method, or no question that both answered.
    """
    (left, left_label), (right, right_label) = opened(first), opened(second)
    pairs = pairs_of(left, left_label or None, right, right_label or None)
    if same_folder(left, right) and all(a == b for a, b in pairs):
        raise ConfigError(
            f"Both sides are the same run. Name two methods, such as "
            f"'{left.path}:{labels_of(left)[0]}' and another of: {', '.join(labels_of(left))}."
        )
    found, cells = [], left.cells()
    for a, b in pairs:
        tasks, others = by_task(left, a), by_task(right, b)
        for task in tasks:
            names = (titled(left, a, right), titled(right, b, left))
            for on, one, other in matched(tasks[task], others.get(task, {}), names):
                told = (names[0] + on, names[1] + on)
                made = _compare(task, told, one, other, resamples, cells)
                found += [made] if made is not None else []
    if not found:
        raise ConfigError(
            f"{first!r} and {second!r} have no question in common that both answered. Compare runs "
            f"of the same task with the same options."
        )
    return found


def _compare(
    task: str, names: tuple[str, str], first: Mapping[Any, Record], second: Mapping[Any, Record],
    resamples: int, cells: Mapping[str, Cell],
) -> Comparison | None:  # fmt: skip
    """B against A on the questions of one task that both answered."""
    both = [name for name in sorted(first) if name in second]
    pairs = [(first[name], second[name]) for name in both]
    for a, b in pairs:
        if (a.question, a.answers) != (b.question, b.answers):
            raise ConfigError(
                f"{names[0]} and {names[1]} asked different questions under the name "
                f"{a.sample!r}; they cannot be compared."
            )
    scored = [(a, b) for a, b in pairs if a.score is not None and b.score is not None]
    if not scored:
        return None
    one = [float(a.score or 0.0) for a, _ in scored]
    two = [float(b.score or 0.0) for _, b in scored]
    clusters = [a.cluster or a.sample for a, _ in scored]
    paired = paired_bootstrap(two, one, clusters, resamples=resamples)
    right = [(x >= _RIGHT, y >= _RIGHT) for x, y in zip(one, two, strict=True)]
    only = sum(x and not y for x, y in right), sum(y and not x for x, y in right)
    return Comparison(
        task=task,
        first=names[0],
        second=names[1],
        samples=len(scored),
        pictures=len(set(clusters)),
        left_out=len({*first, *second}) - len(scored),
        first_score=100 * sum(one) / len(one),
        second_score=100 * sum(two) / len(two),
        difference=PairedDifference(100 * paired.delta, 100 * paired.low, 100 * paired.high),
        only_first=only[0],
        only_second=only[1],
        p_value=mcnemar(*only),
        fractional=any(x not in (0.0, 1.0) for x in (*one, *two)),
        own=_own(scored, cells, resamples),
    )


def _own(
    scored: Sequence[tuple[Record, Record]], cells: Mapping[str, Cell], resamples: int
) -> OwnFigure | None:
    """The task's own figure of both sides; ``None`` where it is the mean that is told anyway."""
    sides: list[dict[int, list[Line]]] = [{}, {}]
    for pair in scored:
        seed = cells[pair[0].cell].seed
        for side, record in zip(sides, pair, strict=True):
            side.setdefault(seed, []).append(_line(record))
    one, two = ([*side.values()] for side in sides)
    draws = Draws([r.cluster for lines in one for r in lines], resamples=resamples)
    about = cells[scored[0][0].cell].task
    # With every answer right F1 and the mean are one; so both sides are asked.
    scorer = next((s for side in (one, two) if not (s := Scorer(about, draws, side[0])).mean), None)
    if scorer is None or scorer.task is None:
        return None
    if not all("score" in scorer.figures(lines) for lines in (*one, *two)):
        return None
    (first, low), (second, high) = pooled(one, scorer), pooled(two, scorer)
    every = [line for lines in one for line in lines]
    ends = scorer.ends(every, high - low)
    return OwnFigure(
        scorer.task.metric_name, scorer.task.unit, first, second,
        PairedDifference(second - first, *ends),
    )  # fmt: skip


def _line(record: Record) -> Line:
    """What a task's aggregate reads of a scored record."""
    return Line(
        sample=record.sample, question=record.question, kind=record.kind,
        cluster=record.cluster or record.sample, answers=record.answers, choices=record.choices,
        answer=record.answer, score=record.score, meta=record.meta, error=None, text=record.text,
        tokens=None, macs=None, kv_bytes=None, new_tokens=None,
    )  # fmt: skip


def _ends(x: Comparison) -> str:
    if x.pictures < 2:
        return "(no interval: all questions are about one picture)"
    return (
        f"[{x.difference.low:+.2f}, {x.difference.high:+.2f}] (95 %, paired bootstrap over "
        f"pictures)"
    )


def _own_line(own: OwnFigure) -> str:
    diff, unit = own.difference, " %" if own.unit == "%" else ""
    ends = "" if math.isnan(diff.low) else f" [{diff.low:+.2f}, {diff.high:+.2f}]"
    return (
        f"  {own.name}: A {own.first:.2f}{unit}, B {own.second:.2f}{unit}, B - A = "
        f"{diff.delta:+.2f}{ends}"
    )


def to_text(comparisons: Sequence[Comparison]) -> str:
    """The comparisons for people, a few lines each."""
    parts = []
    for x in comparisons:
        diff = x.difference
        lines = [
            f"{x.task}: A = {x.first}, B = {x.second}",
            f"  {x.samples} samples of {x.pictures} pictures that both answered"
            + (f" ({x.left_out} left out)" if x.left_out else ""),
            f"  mean per question: A {x.first_score:.2f} %, B {x.second_score:.2f} %, B - A = "
            f"{diff.delta:+.2f} points {_ends(x)}",
            *([] if x.own is None else [_own_line(x.own)]),
            f"  right in A alone: {x.only_first}, in B alone: {x.only_second}; McNemar's exact "
            f"test: p = {x.p_value:.3g}"
            + (" (scores of 0.5 and more count as right)" if x.fractional else ""),
        ]
        parts.append("\n".join(lines))
    return "\n".join(parts)
