# SPDX-License-Identifier: Apache-2.0
"""Multiple choice by letter: named rules that read a letter from a model's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from visprune.errors import ConfigError
from visprune.eval.metrics.base import AnswerMetric, check_variant, references_of
from visprune.eval.metrics.letter_rules import ALL, RULES

__all__ = ["LETTER_PARSERS", "LetterMatch", "LetterParser", "parse_letter"]

LetterParser = Literal[
    "lenient", "scienceqa-lmms-eval", "scienceqa-llava", "seed-lmms-eval", "seed-llava",
    "vlmevalkit",
]  # fmt: skip
LETTER_PARSERS = tuple(RULES)


def parse_letter(
    text: str, choices: Sequence[str], parser: LetterParser = "lenient"
) -> tuple[str | None, str]:
    """Return the letter that an output names and the rule that found it, or ``(None, "")``.

    Args:
        text: the output.
        choices: texts of the options; none: every letter is allowed.
        parser: ``"lenient"``: in this order ``"letter"`` (alone: "b", "(B)", "**B**"),
            ``"letter_first"`` ("B. a cat", "(B) a cat", a first line "B"), ``"answer_is"``
            ("Answer: B", "Option B", "It is B."), ``"letter_last"`` (behind other lines a last one
            "B"), ``"option_text"`` (exactly one option, word for word); a thought (``<think>``) is
            no answer. ``"scienceqa-lmms-eval"``: the letter alone, or a capital and a period at the
            start. ``"scienceqa-llava"``: the letter alone, "B. ", or "The answer is B."
            ``"seed-lmms-eval"``: the first character, in either case; ``"seed-llava"``: the whole
            output. ``"vlmevalkit"``: VLMEvalKit's rules without a judge (MMBench); its Z, for an
            output that refuses, is no option.

    Raises:
        ConfigError: unknown parser.
    """
    check_variant("LetterMatch", "parser", parser, LETTER_PARSERS)
    allowed = ALL[: len(choices)] if choices else ALL
    # VLMEvalKit takes outputs as they are: blanks count where it asks whether one is too long.
    given = text if parser == "vlmevalkit" else text.strip()
    for rule, read in RULES[parser]:
        letter = read(given, choices)
        # As published: what the first rule that fits has read counts, allowed or not, wrong if not.
        if letter is not None and (letter in allowed or parser != "lenient"):
            return letter, rule
    return None, ""


def answer_letter(reference: str, choices: Sequence[str]) -> str:
    """Return the letter of a reference that is a letter or the text of an option.

    Raises:
        ConfigError: it is neither.
    """
    allowed = ALL[: len(choices)] if choices else ALL
    texts = [choice.strip() for choice in choices]
    if reference.strip() in texts:
        return ALL[texts.index(reference.strip())]
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
