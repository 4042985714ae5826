# SPDX-License-Identifier: Apache-2.0
"""What a text-only model reaches: answers by the question's first words, cross-fitted by picture.

A question gets the commonest answer of the training questions that begin with the same words. How
many of them it takes to be believed is learned: where the same sentence is asked of several
pictures with different answers (NLVR, VQAv2), the few others of a long beginning vote against the
right one, and a short beginning, or none, does better.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

__all__ = ["SUPPORTS", "commonest", "prior_answers"]

SUPPORTS = (1, 2, 4, 8, 16, 32, 2**62)
"""Questions that a beginning must have to be believed; the last: only the empty one ever has."""
_FOLDS = 10
_TIES = 8


class Asked(Protocol):
    """What is read of a question."""

    @property
    def question(self) -> str:
        """The question."""

    @property
    def usual(self) -> str:
        """Its commonest reference."""

    @property
    def picture(self) -> str:
        """Id of its picture."""


Score = Callable[[int, str], float]
"""The score of an answer to the question of a number."""


def commonest(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the commonest answers, sorted; of many that tie, some from all over the order.

    Where every answer is another one, all of them tie, and none is right more than once.
    """
    most = max(counts.values(), default=0)
    tied = sorted(answer for answer, count in counts.items() if count == most)
    return tuple(tied[:: -(-len(tied) // _TIES) or 1])


def prior_answers(
    asked: Sequence[Asked], score: Score, fit: Sequence[Asked] | None, fit_score: Score
) -> list[tuple[str, ...]]:
    """Return the answers of a text-only model, each a tie of one or more.

    Args:
        asked: the questions.
        score: of an answer to one of them.
        fit: a train split's questions. ``None``: those asked, in ten folds of whole pictures; each
            fold is answered from the other nine, with the support that does best on those.
        fit_score: of an answer to one of ``fit``.
    """
    if fit is not None:
        support = int(np.argmax(_cross_fitted(fit, fit_score)[1].sum(0)))
        table = _Table(fit, np.zeros(len(fit), int))
        return [table.answers(question, None)[support] for question in asked]
    folds, totals, answers = _cross_fitted(asked, score)
    best = [int(np.argmax(totals.sum(0) - totals[fold])) for fold in range(len(totals))]
    return [answers[number][best[fold]] for number, fold in enumerate(folds)]


def _cross_fitted(
    asked: Sequence[Asked], score: Score
) -> tuple[np.ndarray, np.ndarray, list[tuple[tuple[str, ...], ...]]]:
    """Return the fold of each question, the score of each fold under each support, all answers."""
    folds = _folds([question.picture for question in asked])
    table = _Table(asked, folds)
    totals = np.zeros((max(folds, default=0) + 1, len(SUPPORTS)))  # [folds, supports]
    answers = []
    for number, (question, fold) in enumerate(zip(asked, folds, strict=True)):
        said = table.answers(question, int(fold))
        known: dict[tuple[str, ...], float] = {}
        for support, tied in enumerate(said):
            if tied not in known:
                known[tied] = sum(score(number, answer) for answer in tied) / max(1, len(tied))
            totals[fold, support] += known[tied]
        answers.append(said)
    return folds, totals, answers


def _folds(pictures: Sequence[str]) -> np.ndarray:
    """Return a fold for each question: whole pictures, as many in each, whatever their order."""
    names = sorted(set(pictures), key=lambda name: hashlib.sha256(repr(name).encode()).digest())
    fold = {name: place % _FOLDS for place, name in enumerate(names)}
    return np.array([fold[name] for name in pictures], int)


class _Table:
    """Counts of answers by the questions' beginnings, in all and by fold.

    Args:
        known: what to learn from.
        folds: of each question.
    """

    def __init__(self, known: Sequence[Asked], folds: np.ndarray) -> None:
        often: Counter[int] = Counter()
        for question in known:
            often.update(map(hash, _beginnings(question.question)))
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._own: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        self._known: dict[tuple[str, int | None], tuple[int, tuple[str, ...]]] = {}
        # A beginning that one question alone has teaches nobody else; most are such.
        least = 2 if max(folds, default=0) else 1
        for question, fold in zip(known, folds, strict=True):
            for words in _beginnings(question.question):
                if often[hash(words)] >= least:
                    self._counts[words][question.usual] += 1
                    self._own[words, int(fold)][question.usual] += 1

    def answers(self, question: Asked, fold: int | None) -> tuple[tuple[str, ...], ...]:
        """Return the tied answers under each support, counts of ``fold`` left out."""
        found: list[tuple[str, ...]] = []
        for words in _beginnings(question.question):
            total, tied = self._best(words, fold)
            last = not words
            while len(found) < len(SUPPORTS) and total and (last or total >= SUPPORTS[len(found)]):
                found.append(tied)
        return tuple(found) + ((),) * (len(SUPPORTS) - len(found))

    def _best(self, words: str, fold: int | None) -> tuple[int, tuple[str, ...]]:
        """Return how many questions begin so, without those of a fold, and their answers."""
        counts = self._counts.get(words)
        if counts is None:
            return 0, ()
        if (words, fold) not in self._known:
            own = None if fold is None else self._own.get((words, fold))
            left = counts - own if own else counts
            self._known[words, fold] = sum(left.values()), commonest(left)
        return self._known[words, fold]


def _beginnings(question: str) -> list[str]:
    """Return a question's beginnings, the longest first and the empty one last."""
    words = question.lower().split()
    return [" ".join(words[:count]) for count in range(len(words), -1, -1)]
