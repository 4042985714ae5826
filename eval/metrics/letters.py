# SPDX-License-Identifier: Apache-2.0
"""Multiple choice by letter: named rules that read a letter from a model's output."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from visprune.errors import ConfigError
from visprune.eval.metrics.base import AnswerMetric, check_variant, references_of
from visprune.eval.metrics.text import plain_text

__all__ = ["LETTER_PARSERS", "LetterMatch", "LetterParser", "parse_letter"]

LetterParser = Literal["lenient", "scienceqa-lmms-eval", "scienceqa-llava", "seed"]
LETTER_PARSERS = ("lenient", "scienceqa-lmms-eval", "scienceqa-llava", "seed")

_ALL = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:,]?")
# A sign must follow: "A dog" begins with an article.
_START = re.compile(r"[(\[]([A-Z])[)\]]|([A-Z])[.:),](?=\s|$)")
_SAID = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*[(\[]?([A-Z])\b(?!')")
_LLAVA = re.compile(r"The answer is ([A-Z]).")


def parse_letter(
    text: str, choices: Sequence[str], parser: LetterParser = "lenient"
) -> tuple[str | None, str]:
    """Return the letter that an output names and the rule that found it, or ``(None, "")``.

    Args:
        text: the output.
        choices: texts of the options; none: every letter is allowed.
        parser: ``"lenient"``: in this order ``"letter"`` (alone: "b", "(B)", "B."),
            ``"letter_first"`` ("B. a cat", "(B) a cat"), ``"answer_is"`` ("The answer is B"),
            ``"option_text"`` (exactly one option, word for word). ``"scienceqa-lmms-eval"``: the
            letter alone, or a capital and a period at the start. ``"scienceqa-llava"``: the letter
            alone, "B. ", or "The answer is B."; ``"seed"``: the first character.

    Raises:
        ConfigError: unknown parser.
    """
    check_variant("LetterMatch", "parser", parser, LETTER_PARSERS)
    allowed = _ALL[: len(choices)] if choices else _ALL
    for rule, read in _RULES[parser]:
        letter = read(text.strip(), choices)
        # As published: what the first rule that fits has read counts, allowed or not, wrong if not.
        if letter is not None and (letter in allowed or parser != "lenient"):
            return letter, rule
    return None, ""


def _alone(text: str, choices: Sequence[str]) -> str | None:
    found = _ALONE.fullmatch(text)
    return found[1].upper() if found else None


def _first(text: str, choices: Sequence[str]) -> str | None:
    found = _START.match(text)
    return (found[1] or found[2]) if found else None


def _said(text: str, choices: Sequence[str]) -> str | None:
    letters = set(_SAID.findall(text))
    return letters.pop() if len(letters) == 1 else None


def _option_text(text: str, choices: Sequence[str]) -> str | None:
    given = plain_text(text)
    same = [_ALL[i] for i, choice in enumerate(choices) if given and plain_text(choice) == given]
    return same[0] if len(same) == 1 else None


def _exact_capital(text: str, choices: Sequence[str]) -> str | None:
    return text if len(text) == 1 and text in _ALL else None


def _capital_period(text: str, choices: Sequence[str]) -> str | None:
    return text[0] if re.match(r"[A-Z]\.", text) else None


def _capital_period_blank(text: str, choices: Sequence[str]) -> str | None:
    return text[0] if re.match(r"[A-Z]\. ", text) else None


def _llava_said(text: str, choices: Sequence[str]) -> str | None:
    found = _LLAVA.findall(text)
    return found[0] if len(found) == 1 else None


def _first_character(text: str, choices: Sequence[str]) -> str | None:
    return text[:1] or None


Rule = tuple[str, Callable[[str, Sequence[str]], str | None]]
_RULES: dict[str, tuple[Rule, ...]] = {
    "lenient": (
        ("letter", _alone),
        ("letter_first", _first),
        ("answer_is", _said),
        ("option_text", _option_text),
    ),
    "scienceqa-lmms-eval": (("letter", _exact_capital), ("letter_first", _capital_period)),
    "scienceqa-llava": (
        ("letter", _exact_capital),
        ("letter_first", _capital_period_blank),
        ("answer_is", _llava_said),
    ),
    "seed": (("first_character", _first_character),),
}


def answer_letter(reference: str, choices: Sequence[str]) -> str:
    """Return the letter of a reference that is a letter or the text of an option.

    Raises:
        ConfigError: it is neither.
    """
    allowed = _ALL[: len(choices)] if choices else _ALL
    texts = [choice.strip() for choice in choices]
    if reference.strip() in texts:
        return _ALL[texts.index(reference.strip())]
    letter = reference.strip().upper()
    if len(letter) == 1 and letter in allowed:
        return letter
    raise ConfigError(
        f"The answer {reference!r} is neither a letter of {allowed[0]} to {allowed[-1]} nor one of "
        f"the choices {list(choices)}."
    )


class LetterMatch(AnswerMetric):
    """Share of multiple-choice questions whose letter is right, in percent.

    References are letters, option texts where a ``Sample`` brings the choices, or pairs
    ``(answer, choices)``.

    Args:
        parser: how the letter is read; see :func:`parse_letter`.

    Raises:
        ConfigError: unknown parser.
    """

    def __init__(self, parser: LetterParser = "lenient", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant("LetterMatch", "parser", parser, LETTER_PARSERS)
        self.parser: LetterParser = parser

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return 1 for the right letter."""
        answers, choices = _answers_and_choices(reference)
        letter, _ = parse_letter(prediction, choices, self.parser)
        return float(letter in {answer_letter(answer, choices) for answer in answers})

    def is_parsed(self, prediction: str, reference: Any) -> bool:
        """Return whether a letter was found."""
        choices = _answers_and_choices(reference)[1]
        return parse_letter(prediction, choices, self.parser)[0] is not None


def _answers_and_choices(reference: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if isinstance(reference, tuple) and len(reference) == 2 and not isinstance(reference[1], str):
        return references_of(reference[0]), tuple(reference[1])
    return references_of(reference), tuple(getattr(reference, "choices", ()))
