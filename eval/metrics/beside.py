# SPDX-License-Identifier: Apache-2.0
"""What stands beside every score: unparsed answers, yes-rate, floors without a picture, loyalty.

All of it is computed from records (or samples) alone; figures are in percent unless the task counts
points.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from visprune.eval.metrics.base import AnswerMetric, percent, references_of
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


@dataclass(frozen=True)
class Floors:
    """What a model reaches that never sees the picture, in the task's unit.

    Attributes:
        majority: the task's score if every question gets the same answer, the best one.
        majority_answer: that answer.
        per_kind: the task's score if every question gets the commonest answer of its kind; ``None``
            where no kind has two answers: such a kind (a class of pictures) is the answer.
        prior: the task's score if every question gets the commonest answer of the questions that
            begin with the same words, as many as possible (a text-only model; chance has no part).
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
        asked: its records or samples.
        fit: records or samples of a train split, to learn the commonest answers from. ``None``:
            they are counted on the questions asked, leaving out those about the same picture for
            the prior (with them, every rare question would know its own answer).

    Returns:
        The floors; ``None`` for tasks without text answers (boxes).
    """
    written: dict[str, str] = {}
    guesses = [_guess(item, written) for item in asked]
    known = guesses if fit is None else [_guess(item, written) for item in fit]
    if not guesses or not all(guess.answers for guess in (*guesses, *known)):
        return None
    commonest = Counter(guess.usual for guess in known).most_common(3)
    constant = {answer: _score(task, guesses, [answer] * len(guesses)) for answer, _ in commonest}
    best = max(constant, key=lambda answer: constant[answer])
    prior = _prior_answers(guesses, known, hold_out=fit is None)
    return Floors(
        majority=constant[best], majority_answer=best,
        per_kind=_per_kind(task, guesses, known, best), prior=_score(task, guesses, prior),
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
    usual = {kind: found.most_common(1)[0][0] for kind, found in counts.items()}
    return _score(task, guesses, [usual.get(guess.kind, otherwise) for guess in guesses])


def _prior_answers(guesses: Sequence[_Guess], known: Sequence[_Guess], hold_out: bool) -> list[str]:
    """Return for each question the commonest answer under its longest known beginning.

    Args:
        guesses: the questions.
        known: what to learn from.
        hold_out: ``known`` are the questions themselves: leave out those about the same picture.
    """
    table = _by_prefix(known)
    pictures: dict[str, list[int]] = defaultdict(list)
    for number, guess in enumerate(guesses):
        pictures[guess.cluster or guess.sample].append(number)
    answers = [""] * len(guesses)
    for numbers in pictures.values():  # one picture's own counts at a time: memory stays small
        own = _by_prefix([guesses[number] for number in numbers]) if hold_out else {}
        for number in numbers:
            for prefix in _prefixes(guesses[number].question):
                if counts := table.get(prefix, Counter()) - own.get(prefix, Counter()):
                    answers[number] = counts.most_common(1)[0][0]
                    break
    return answers


def _by_prefix(guesses: Sequence[_Guess]) -> dict[str, Counter[str]]:
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for guess in guesses:
        for prefix in _prefixes(guess.question):
            table[prefix][guess.usual] += 1
    return table


def _prefixes(question: str) -> list[str]:
    """Return a question's beginnings, the longest first and the empty one last."""
    words = question.lower().split()
    return [" ".join(words[:count]) for count in range(len(words), -1, -1)]


def _score(task: Any, guesses: Sequence[_Guess], answers: Sequence[str]) -> float:
    from visprune.eval.tasks.base import sample_of

    if task is None:
        right = (said in guess.answers for guess, said in zip(guesses, answers, strict=True))
        return percent(sum(right), len(guesses))
    records = []
    for guess, answer in zip(guesses, answers, strict=True):
        sample = sample_of(guess)
        parsed = task.parse(answer, sample)
        values = vars(guess) | {"answer": parsed.answer, "text": answer}
        records.append(_Guess(**(values | {"score": task.score(sample, parsed)})))
    return task.aggregate(records)["score"]
