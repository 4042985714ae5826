# SPDX-License-Identifier: Apache-2.0
"""The rows of every table: one per method at a budget (an arm) on a task, seeds pooled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from visprune.eval.metrics.beside import Floors, loyal, yes_rate, yes_wanted
from visprune.eval.report.efficiency import Efficiency, efficiency_of
from visprune.eval.report.estimate import Scorer, ratio
from visprune.eval.report.read import UNTOUCHED, Line, Outcome

__all__ = ["Arm", "Figure", "Row", "Table", "build_row", "pooled"]

Figure = tuple[float, float, float]  # value, lower end, upper end
Pair = tuple[Line, Line]  # ours and the untouched model's, of the same sample

OTHER = "(other kinds)"


@dataclass(frozen=True)
class Arm:
    """A method at a budget, on a model.

    Attributes:
        model: name of the model, told apart from others of that name.
        label: what the study calls it.
        method: its name; ``"none"`` for the untouched model.
        num_keep: its budget in tokens; ``None``: it has none.
        control: whether it stands there to be beaten.
        parameters: everything the method was given, its seed left out.
    """

    model: str
    label: str
    method: str
    num_keep: float | None
    control: bool
    parameters: str

    @property
    def untouched(self) -> bool:
        """Whether it is the model without a method."""
        return self.method == UNTOUCHED


@dataclass
class Row:
    """What one arm did on one task. Scores and differences are in the unit of the task.

    Attributes:
        arm: which one.
        seeds: the seeds that were pooled.
        n: records.
        pictures: distinct pictures among them.
        score: with its interval; errors left out.
        score_errors_wrong: errors scored 0.
        delta: paired difference to the untouched model, on the samples that both answered.
        paired: how many those were.
        agreement: share of the samples that both answered, scored or not, with the same answer as
            the untouched model ("loyalty").
        errors: count by type.
        unparsed: records without an error whose answer no rule could read.
        yes_rate: share of "yes" among answers to yes-no questions, unparsed ones included;
            ``None``: there were none.
        yes_wanted: the share that the references hold.
        spread: standard deviation of the score over seeds; ``None`` for one seed.
        figures: all that the task reports, mean over seeds.
        cost: operations, tokens, bytes, measured time.
        kinds: by kind of question: n, score, delta (both with interval).
        pareto: the costs at which no other arm scores higher for less.
        published: numbers from papers for this arm and task.
    """

    arm: Arm
    seeds: list[int]
    n: int
    pictures: int
    score: Figure | None
    score_errors_wrong: float | None
    delta: Figure | None
    paired: int
    agreement: float | None
    errors: dict[str, int]
    unparsed: int
    yes_rate: float | None
    yes_wanted: float | None
    spread: float | None
    figures: dict[str, float]
    cost: Efficiency
    kinds: dict[str, dict[str, Any]]
    outcomes: list[Outcome]
    pareto: list[str] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    relative: np.ndarray | None = None  # replicates of score / untouched score, for the average

    @property
    def answered(self) -> int:
        """Records without an error."""
        return self.n - sum(self.errors.values())


@dataclass
class Table:
    """All arms of one model on one task.

    Attributes:
        model: as in :class:`Arm`.
        task: title of the task.
        about: ``task.to_dict()`` without the seed.
        prompt_style: how prompts were worded.
        metric: name of the metric.
        unit: ``"%"`` or ``"points"``.
        mean: whether the score is a mean over samples.
        rows: untouched first, then controls, then methods.
        samples: distinct samples.
        pictures: distinct pictures.
        kinds: samples by kind, commonest first.
        floors: what is reached without a picture or a model; ``None``: nothing to compute it from.
        notes: what a reader must know.
    """

    model: str
    task: str
    about: Mapping[str, Any]
    prompt_style: str
    metric: str
    unit: str
    mean: bool
    rows: list[Row]
    samples: int
    pictures: int
    kinds: dict[str, int]
    floors: Floors | None
    notes: list[str]


def build_row(
    arm: Arm,
    outcomes: list[Outcome],
    whole: Mapping[str, Sequence[Outcome]],
    scorer: Scorer,
    kinds: Sequence[str],
) -> Row:
    """Summarise the outcomes of one arm on one task.

    Args:
        arm: which one.
        outcomes: one per seed.
        whole: the untouched model's outcomes, by task.
        scorer: of the task.
        kinds: to break down by; what is rarer goes into one more.
    """
    lines = [line for outcome in outcomes for line in outcome.lines.values()]
    scored = _figures(outcomes, scorer, errors_count=False)
    strict = [found["score"] for found in _figures(outcomes, scorer, errors_count=True)]
    values = [found["score"] for found in scored]
    answered = [_both(outcome, whole) for outcome in outcomes]
    by_seed = [[(a, b) for a, b in pairs if None not in (a.score, b.score)] for pairs in answered]
    both = [pair for pairs in by_seed for pair in pairs]
    score, delta, relative = _estimates(arm, outcomes, by_seed, scored, scorer)
    names = dict.fromkeys(name for found in scored for name in found)
    return Row(
        arm=arm, seeds=[outcome.cell.seed for outcome in outcomes], n=len(lines),
        pictures=len({line.cluster for line in lines}), score=score,
        score_errors_wrong=float(np.mean(strict)) if strict else None, delta=delta,
        paired=len(both),
        agreement=_share(loyal([pair for pairs in answered for pair in pairs])),
        errors=dict(Counter(line.error for line in lines if line.error is not None).most_common()),
        unparsed=sum(line.answer is None and line.error is None for line in lines),
        yes_rate=_share(yes_rate(lines)), yes_wanted=_share(yes_wanted(lines)),
        spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        figures={n: float(np.mean([found[n] for found in scored if n in found])) for n in names},
        cost=efficiency_of(lines, outcomes), kinds=_kinds(lines, both, arm, scorer, kinds),
        outcomes=outcomes, relative=relative,
    )  # fmt: skip


def _figures(
    outcomes: Sequence[Outcome], scorer: Scorer, *, errors_count: bool
) -> list[dict[str, float]]:
    """What the task reports of each outcome that has a score."""
    every = [
        scorer.figures(list(outcome.lines.values()), errors_count=errors_count)
        for outcome in outcomes
    ]
    return [found for found in every if "score" in found]


def _both(outcome: Outcome, whole: Mapping[str, Sequence[Outcome]]) -> list[Pair]:
    """Pairs of lines of the same sample, ours and the untouched model's, both with an answer."""
    base = _base(outcome, whole.get(outcome.task, ()))
    pairs = [(line, base[name]) for name, line in outcome.lines.items() if name in base]
    return [(a, b) for a, b in pairs if a.error is None and b.error is None]


def _base(outcome: Outcome, whole: Sequence[Outcome]) -> Mapping[str, Line]:
    """Lines of the untouched model: of the same seed, else (it draws nothing) of the first."""
    same = [base for base in whole if base.cell.seed == outcome.cell.seed]
    return (same or list(whole))[0].lines if whole else {}


def _share(percent: float | None) -> float | None:
    return None if percent is None or np.isnan(percent) else percent / 100.0


def _estimates(
    arm: Arm, outcomes: Sequence[Outcome], both: Sequence[Sequence[Pair]],
    scored: Sequence[Mapping[str, float]], scorer: Scorer,
) -> tuple[Figure | None, Figure | None, np.ndarray | None]:  # fmt: skip
    """Return score, paired difference, and replicates of the score relative to the untouched.

    Args:
        arm: which one.
        outcomes: one per seed.
        both: scored pairs of each outcome.
        scored: figures of the outcomes that have some.
        scorer: of the task.
    """
    if not scored:
        return None, None, None
    value, draws = pooled([list(outcome.lines.values()) for outcome in outcomes], scorer)
    lines = [line for outcome in outcomes for line in outcome.lines.values()]
    score = (value, *scorer.interval(lines, draws))
    pairs = [pair for pairs in both for pair in pairs]
    if not pairs:
        return score, None, None
    mine, ours = pooled([[a for a, _ in pairs] for pairs in both], scorer)
    base, theirs = pooled([[b for _, b in pairs] for pairs in both], scorer)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = 100.0 * ours / theirs
    if arm.untouched:
        return score, None, relative
    return score, (mine - base, *scorer.ends([a for a, _ in pairs], ours - theirs)), relative


def pooled(sets: Sequence[Sequence[Line]], scorer: Scorer) -> tuple[float, np.ndarray]:
    """Return score and replicates ``[R]`` of several seeds: of all samples, or in the mean.

    A figure that is no mean over samples (acc+ of two questions per picture) is made of each seed
    alone: with all seeds in one, a picture would have four questions.
    """
    sets = [lines for lines in sets if "score" in scorer.figures(lines)]
    if scorer.mean:
        lines = [line for lines in sets for line in lines]
        known = [line.score for line in lines if line.score is not None]
        return 100.0 * float(np.mean(known)), scorer.replicates(lines)
    values = [scorer.figures(lines)["score"] for lines in sets]
    return float(np.mean(values)), np.mean([scorer.replicates(lines) for lines in sets], axis=0)


def _kinds(
    lines: Sequence[Line], both: Sequence[Pair], arm: Arm, scorer: Scorer,
    shown: Sequence[str],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the mean score (percent) and the paired difference by kind, each with interval.

    Questions that were put to one cache in turn stand by their turn, too.
    """
    group: dict[str, list[Line]] = {}
    pair: dict[str, list[tuple[str, float | None]]] = {}
    shared: dict[str, list[Line]] = {}
    for line in lines:
        for name in _groups(line, shown):
            group.setdefault(name, []).append(line)
    for a, b in both:
        change = (a.score or 0.0) - (b.score or 0.0)
        for name in _groups(a, shown):
            pair.setdefault(name, []).append((a.cluster, change))
            shared.setdefault(name, []).append(a)
    names = [name for name in (*shown, OTHER) if name in group]
    names += sorted(group.keys() - {*names})
    if not names:
        return {}
    columns = [scorer.totals([(x.cluster, x.score) for x in group[name]]) for name in names]
    columns += [scorer.totals(pair.get(name, [])) for name in names]
    values = np.concatenate(columns, axis=1)  # [C, 4 * kinds]
    point, draws = ratio(values.sum(0)), ratio(scorer.draws.sums(values))
    found = {}
    for number, name in enumerate(names):
        other = number + len(names)
        found[name] = {
            "n": len(group[name]),
            "score": (float(point[number]), *scorer.interval(group[name], draws[:, number])),
            "delta": None if arm.untouched or name not in pair
            else (float(point[other]), *scorer.ends(shared[name], draws[:, other])),
        }  # fmt: skip
    return found


def _groups(line: Line, shown: Sequence[str]) -> list[str]:
    """The kind of a question, where there are several, and its turn, where it has one."""
    kinds = [line.kind if line.kind in shown else OTHER] if shown else []
    turn = line.meta.get("turn")
    return [*kinds, f"turn {turn}"] if isinstance(turn, int) else kinds
