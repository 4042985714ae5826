# SPDX-License-Identifier: Apache-2.0
"""What stands beside every score: unparsed answers, yes-rate, floors without a picture, loyalty.

All of it is computed from records (or samples) alone; figures are in percent unless the task counts
points.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from visprune.eval.metrics.base import AnswerMetric, percent, references_of
from visprune.eval.metrics.prior import commonest, prior_answers
from visprune.eval.metrics.text import plain_text
from visprune.eval.metrics.yesno import yes_no_label

__all__ = [
    "Floors",
    "Loyalty",
    "agree",
    "beside",
    "floors",
    "loyal",
    "loyalty",
    "unparsed_rate",
    "yes_rate",
    "yes_wanted",
]


_DRAWS = 32  # of ties, where a score is no mean over samples


@dataclass(frozen=True)
class Floors:
    """What a model reaches that never sees the picture, in the task's unit.

    Attributes:
        majority: the task's score if every question gets the same answer, the best one.
        majority_answer: that answer.
        per_kind: the task's score if every question gets the commonest answer of its kind; ``None``
            where no kind has two answers: such a kind (a class of pictures) is the answer.
        prior: the task's score of a text-only model, see :mod:`visprune.eval.metrics.prior`; where
            that is less than ``majority``, a text-only model does as well by one answer, and this
            is ``majority``. Where answers tie, it is what drawing one of them gives in the mean.
    """

    majority: float
    majority_answer: str
    per_kind: float | None
    prior: float


@dataclass(frozen=True)
class _Guess:
    """A record of an answer that no model gave."""

    sample: str
    kind: str
    cluster: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    question: str
    usual: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    answer: str | None = None
    text: str | None = None
    score: float | None = None
    error: None = None

    @property
    def picture(self) -> str:
        """Id of the picture."""
        return self.cluster or self.sample


def unparsed_rate(records: Sequence[Any]) -> float:
    """Return the share of answers that no parse rule could read; errors are not answers."""
    answered = [record for record in records if _answered(record)]
    return percent(sum(record.answer is None for record in answered), len(answered))


def _answered(record: Any) -> bool:
    """Return whether a model answered; scores are absent also where answers are not public."""
    return record.text is not None and getattr(record, "error", None) is None


def yes_rate(records: Sequence[Any]) -> float | None:
    """Return the share of "yes" among questions whose right answer is yes or no.

    A pruned model that says yes to everything keeps half of such a benchmark. ``None`` where the
    task has no such questions.
    """
    asked = [
        record
        for record in records
        if _answered(record) and len(_labels(record)) == 1 and None not in _labels(record)
    ]
    if not asked:
        return None
    return percent(sum(yes_no_label(record.answer or "") == "yes" for record in asked), len(asked))


def yes_wanted(records: Sequence[Any]) -> float | None:
    """Return the share of "yes" among the right answers of yes/no questions, ``None`` without."""
    labels = [label for record in records for label in [_labels(record)] if len(label) == 1]
    asked = [label for label in labels if None not in label]
    return percent(sum(label == {"yes"} for label in asked), len(asked)) if asked else None


def _labels(record: Any) -> set[str | None]:
    """Return the one label of a yes/no question; references that differ make it no such one."""
    commonest = Counter(record.answers).most_common(1)
    return {yes_no_label(answer) for answer, _ in commonest}


def loyalty(records: Iterable[Any], baseline: Iterable[Any]) -> float:
    """Return how often a run answers as the unpruned model did, right or wrong.

    Over the samples that both answered; NaN where there is none.
    """
    before = {record.sample: record for record in baseline if _answered(record)}
    pairs = [
        (record, before[record.sample])
        for record in records
        if _answered(record) and record.sample in before
    ]
    return loyal(pairs)


def loyal(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Return how many pairs of answered records agree, in percent; NaN of none.

    What no rule could read is compared as it stands.
    """
    return percent(sum(_same(one, other) for one, other in pairs), len(pairs))


def _same(one: Any, other: Any) -> bool:
    if one.answer is None and other.answer is None:
        return agree(one.text or "", other.text or "")
    return one.answer is not None and other.answer is not None and agree(one.answer, other.answer)


def agree(one: str, other: str) -> bool:
    """Return whether two answers are the same text up to case, articles and punctuation."""
    return one.strip() == other.strip() or plain_text(one) == plain_text(other) != ""


class Loyalty(AnswerMetric):
    """Agreement with the unpruned model's outputs, in percent; references are those outputs."""

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return 1 if the two outputs agree."""
        (before,) = references_of(reference)
        return float(agree(prediction, before))


def floors(task: Any, asked: Iterable[Any], fit: Iterable[Any] | None = None) -> Floors | None:
    """Return what answers without the picture reach under a task's own score.

    Args:
        task: the task; ``None``: an answer is right if it is one of the references.
        asked: its records or samples; records that hold an error are left out, as in the score.
        fit: records or samples of a train split, to learn the commonest answers from. ``None``:
            they are counted on the questions asked, the prior cross-fitted by picture (with its own
            picture, every rare question would know its own answer).

    Returns:
        The floors; ``None`` for tasks without text answers (boxes), and of nothing that was
        answered.
    """
    written: dict[str, str] = {}
    guesses = [_guess(item, written) for item in asked if getattr(item, "error", None) is None]
    known = guesses if fit is None else [_guess(item, written) for item in fit]
    if not guesses or not all(guess.answers for guess in (*guesses, *known)):
        return None
    usual = Counter(guess.usual for guess in known)
    often = sorted(usual, key=lambda answer: (-usual[answer], answer))[:3]
    constant = {answer: _score(task, guesses, [(answer,)] * len(guesses)) for answer in often}
    best = max(constant, key=lambda answer: constant[answer])
    said = prior_answers(
        guesses, _one_score(task, guesses), None if fit is None else known, _one_score(task, known)
    )
    return Floors(
        majority=constant[best], majority_answer=best,
        per_kind=_per_kind(task, guesses, known, best),
        prior=max(constant[best], _score(task, guesses, said)),
    )  # fmt: skip


def beside(
    task: Any, records: Sequence[Any], baseline: Sequence[Any] | None = None
) -> dict[str, float]:
    """Return all of it by name; what does not apply is absent."""
    found: dict[str, float | None] = {
        "unparsed": unparsed_rate(records),
        "yes_rate": yes_rate(records),
        "loyalty": None if baseline is None else loyalty(records, baseline),
    }
    floor = floors(task, records)
    if floor is not None:
        found |= {
            "majority": floor.majority, "per_kind": floor.per_kind, "prior": floor.prior,
        }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _guess(item: Any, written: dict[str, str]) -> _Guess:
    """Return a sample or record as a record without an answer.

    Args:
        item: the sample or record.
        written: normalised answer to how it was first written, so that "Red." and "red" are one.
    """
    usual = ""
    if item.answers:
        (usual, _), *_ = Counter(item.answers).most_common(1)
        usual = written.setdefault(plain_text(usual) or usual, usual)
    return _Guess(
        sample=item.sample if hasattr(item, "sample") else item.id,
        kind=item.kind,
        cluster=item.cluster,
        answers=tuple(item.answers),
        choices=tuple(item.choices),
        question=item.question,
        usual=usual,
        meta=dict(item.meta),
    )


def _per_kind(
    task: Any, guesses: Sequence[_Guess], known: Sequence[_Guess], otherwise: str
) -> float | None:
    """Return the score of the commonest answer of each kind; a kind not known gets another one."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for guess in known:
        counts[guess.kind][guess.usual] += 1
    if all(len(found) == 1 for found in counts.values()):
        return None
    usual = {kind: commonest(found) for kind, found in counts.items()}
    return _score(task, guesses, [usual.get(guess.kind, (otherwise,)) for guess in guesses])


def _one_score(task: Any, guesses: Sequence[_Guess]) -> Callable[[int, str], float]:
    """Return the score, in [0, 1], of an answer to one of the questions."""
    from visprune.eval.tasks.base import sample_of

    if task is None:
        return lambda number, answer: float(answer in guesses[number].answers)

    def score(number: int, answer: str) -> float:
        sample = sample_of(guesses[number])
        return float(task.score(sample, task.parse(answer, sample)))

    return score


def _answered_by(task: Any, guess: _Guess, answer: str) -> _Guess:
    """Return the record of an answer."""
    from visprune.eval.tasks.base import sample_of

    if task is None:
        return replace(guess, answer=answer, text=answer, score=float(answer in guess.answers))
    sample = sample_of(guess)
    parsed = task.parse(answer, sample)
    return replace(guess, answer=parsed.answer, text=answer, score=task.score(sample, parsed))


def _score(task: Any, guesses: Sequence[_Guess], answers: Sequence[tuple[str, ...]]) -> float:
    """Return the task's score of answers; of ties, the expectation of drawing one of them.

    Exact where the task's score is a mean over samples; else (F1, points) the mean of some draws.
    """
    records = [
        [_answered_by(task, guess, answer) for answer in said or ("",)]
        for guess, said in zip(guesses, answers, strict=True)
    ]
    first = [tied[0] for tied in records]
    value = _whole(task, first)
    if all(len(tied) == 1 for tied in records):
        return value
    if math.isclose(value, 100 * fmean(record.score or 0.0 for record in first), abs_tol=1e-9):
        return 100 * fmean(fmean(record.score or 0.0 for record in tied) for tied in records)
    random = np.random.default_rng(0)
    return fmean(
        _whole(task, [tied[int(random.integers(len(tied)))] for tied in records])
        for _ in range(_DRAWS)
    )


def _whole(task: Any, records: Sequence[_Guess]) -> float:
    if task is None:
        return 100 * fmean(record.score or 0.0 for record in records)
    return float(task.aggregate(records)["score"])
