# SPDX-License-Identifier: Apache-2.0
"""Equality of texts: free text with one reference, and GQA as its evaluators have it."""

from __future__ import annotations

import re
import string
import unicodedata
from typing import Any, Literal

from visprune.eval.metrics.base import AnswerMetric, check_variant, references_of

__all__ = [
    "GQA_PARSERS",
    "ExactMatch",
    "GQAAccuracy",
    "GQAParser",
    "exact_match",
    "lost_signs",
    "plain_text",
]

GQAParser = Literal["llava", "official", "lmms-eval", "vlmevalkit"]
GQA_PARSERS = ("llava", "official", "lmms-eval", "vlmevalkit")

_ARTICLES = {"a", "an", "the"}
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split())}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_MONEY = "$\u20ac\u00a3\u00a5\u20b9"
_ORDER = "<>\u2264\u2265"
# "5 %" and "$ 5" are "5%" and "$5".
_LOOSE = re.compile(rf"(?<=\d)\s+(?=%)|(?<=[{_MONEY}{_ORDER}])\s+(?=[-\d{_MONEY}]|\.\d)")
# The signs that carry meaning; every other one becomes a blank.
_SIGNS = re.compile(
    rf"""
      (?<=\d)[.:/](?=\d)                                  # 3.5, 10:30, 1/2
    | (?<![\w.])\.(?=\d)                                  # .5
    | (?<=\w)'(?=\w)                                      # don't
    | (?<=\d)[%{_MONEY}]                                  # 5%, 5 euros
    | (?<!\w)[{_MONEY}](?=-?\.?\d)                        # $5
    | (?<!\w)-(?=[{_MONEY}]?\.?\d)                        # -5
    | (?<![\w{_ORDER}])[{_ORDER}](?=[-{_MONEY}]*\.?\d)    # <5
    | (?<=[^\W\d_])[+\#]+(?!\w)                           # C++, A+, F#
    | (?<!\w)[^\W\d_]{{1,2}}-(?!\w)                       # O-, AB-
    | (?P<blank>[^\w\s]|_)
    """,
    re.VERBOSE,
)


def plain_text(text: str) -> str:
    """Normalise free text: case folded, no punctuation, no articles, number words as digits.

    For data sets with a single reference per question (Visual Genome, easy-VQA), where the VQA
    evaluator, made for ten answers, does not apply. Signs that make another answer stay: those of
    numbers ("-5", "5%", "$5", ".5", "1/2", "<5") and of names ("C++", "F#", "A+"). Accents and
    letters that Unicode writes in several ways are one.

    Example:
        >>> plain_text("  The two dogs. ")
        '2 dogs'
    """
    # Unicode's canonical caseless matching: decomposed, folded ("\u00df" is "ss"), composed.
    text = unicodedata.normalize("NFD", text.replace("\u2019", "'").replace("\u2212", "-"))
    text = unicodedata.normalize("NFC", text.casefold())
    text = _LOOSE.sub("", _THOUSANDS.sub("", text))
    words = _SIGNS.sub(_sign, text).split()
    words = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    return _PERCENT.sub("%", " ".join(words))


_PERCENT = re.compile(r"(?<=\d) (?:percent|per cent)(?= |$)")


def _sign(found: re.Match[str]) -> str:
    """A sign as it stays: ".5" gets its zero, and what carries no meaning is a blank."""
    if found["blank"]:
        return " "
    before = found.string[found.start() - 1 : found.start()]
    return "0." if found[0] == "." and not before.isdecimal() else found[0]


def lost_signs(text: str) -> tuple[str, ...]:
    """Return what :func:`plain_text` leaves out that may have told two answers apart.

    An article at the end ("vitamin A" is no article), signs that are no punctuation of a sentence,
    and punctuation that belongs to a number ("3-4", "1,5", "5'").
    """
    last = text.casefold().split()[1:][-1:]
    articles = [word for word in last if word.strip(".,;:!?'\"()") in _ARTICLES]
    folded = unicodedata.normalize("NFC", text.replace("\u2212", "-"))
    folded = _LOOSE.sub("", _THOUSANDS.sub("", folded))
    signs = [
        m[0] for m in _SIGNS.finditer(folded)
        if m["blank"] and (not _sentence(m[0]) or _of_number(folded, m.start()))
    ]  # fmt: skip
    return tuple(articles + signs)


def _sentence(sign: str) -> bool:
    """Return whether a sign belongs to sentences: punctuation but for @, #, &, * and the like."""
    return unicodedata.category(sign)[0] == "P" and sign not in "#&*@%\\"


_INCHES = "'\"\u2019\u201d\u2032\u2033"


def _of_number(text: str, place: int) -> bool:
    """Return whether a sign stands between two digits, or says feet or inches behind one."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    return before.isdecimal() and (after.isdecimal() or text[place] in _INCHES)


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
