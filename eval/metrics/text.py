# SPDX-License-Identifier: Apache-2.0
"""Equality of texts: free text with one reference, and GQA as its evaluators have it."""

from __future__ import annotations

import re
import string
from typing import Any, Literal

from visprune.eval.metrics.base import AnswerMetric, check_variant, references_of

__all__ = ["GQA_PARSERS", "ExactMatch", "GQAAccuracy", "GQAParser", "exact_match", "plain_text"]

GQAParser = Literal["llava", "official", "lmms-eval", "vlmevalkit"]
GQA_PARSERS = ("llava", "official", "lmms-eval", "vlmevalkit")

_ARTICLES = {"a", "an", "the"}
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split())}
# Every sign becomes a blank, but the period and colon inside a number ("3.5", "10:30") and the
# apostrophe inside a word ("don't").
_SIGNS = re.compile(r"(?<!\d)[.:]|[.:](?!\d)|(?<!\w)'|'(?!\w)|[^\w\s.:']|_")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


def plain_text(text: str) -> str:
    """Normalise free text: lower case, no punctuation, no articles, number words as digits.

    For data sets with a single reference per question (Visual Genome, easy-VQA), where the VQA
    evaluator, made for ten answers, does not apply.

    Example:
        >>> plain_text("  The two dogs. ")
        '2 dogs'
    """
    words = _SIGNS.sub(" ", _THOUSANDS.sub("", text.lower().replace("\u2019", "'"))).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(prediction: str, reference: Any) -> float:
    """Return 1 if the normalised prediction equals one of the normalised references, else 0."""
    given = plain_text(prediction)
    return float(given != "" and given in {plain_text(text) for text in references_of(reference)})


class ExactMatch(AnswerMetric):
    """Share of predictions that equal a reference after :func:`plain_text`, in percent."""

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return 1 for equality."""
        return exact_match(prediction, reference)

    def is_parsed(self, prediction: str, reference: Any) -> bool:
        """Return whether anything is left after normalisation."""
        return bool(plain_text(prediction))


class GQAAccuracy(AnswerMetric):
    """GQA: equality with the one answer, in percent (arXiv:1902.09506).

    Args:
        parser: ``"llava"``: LLaVA's ``convert_gqa_for_eval.py`` (periods off the end, lower case),
            then the official equality; ``"official"``: equality of the texts as they are;
            ``"lmms-eval"``: blanks off the prediction's ends, then case and punctuation ignored on
            both sides; ``"vlmevalkit"``: blanks off the ends and lower case on both sides, so that
            "Yes." is wrong.

    Raises:
        ConfigError: unknown parser.
    """

    def __init__(self, parser: GQAParser = "llava", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant("GQAAccuracy", "parser", parser, GQA_PARSERS)
        self.parser: GQAParser = parser

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return 1 for equality."""
        return gqa_match(prediction, reference, self.parser)


def _lmms_eval(text: str) -> str:
    """Lower case, no punctuation, as NumPy's texts of one width do it.

    They keep their width ("\u0130", whose lower case is two characters, pushes the last one out)
    and lose NULs at the end.
    """
    lower = text.rstrip("\0").lower()[: len(text.rstrip("\0"))].rstrip("\0")
    return lower.translate(_NO_PUNCTUATION).rstrip("\0")


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gqa_match(prediction: str, reference: Any, parser: GQAParser = "llava") -> float:
    """Return 1 if the prediction is GQA's answer under a parser, else 0."""
    (answer,) = references_of(reference)
    given = prediction
    if parser == "llava":
        given = prediction.rstrip(".").lower()
    elif parser == "lmms-eval":
        given, answer = _lmms_eval(prediction.strip()), _lmms_eval(answer)
    elif parser == "vlmevalkit":
        given, answer = (text.strip().lower() for text in (prediction, answer))
    return float(given == answer)
