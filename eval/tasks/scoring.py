# SPDX-License-Identifier: Apache-2.0
"""Named ways to read and score an answer, shared by tasks: metric name to parse rule and score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from visprune.eval.metrics.letters import answer_letter, parse_letter
from visprune.eval.metrics.text import exact_match, gqa_match, plain_text
from visprune.eval.metrics.vqa import vqa_accuracy
from visprune.eval.tasks.base import Parsed, Sample

__all__ = ["SCORINGS", "Scoring"]


@dataclass(frozen=True)
class Scoring:
    """A parse rule and a score.

    Attributes:
        parse: from output and sample to what was read.
        score: of what was read, in [0, 1].
        multiple_choice: whether the prompt lists lettered options.
        generates: whether the model writes text; else it gives class numbers.
    """

    parse: Callable[[str, Sample], Parsed]
    score: Callable[[Sample, Parsed], float]
    multiple_choice: bool = False
    generates: bool = True


def whole_output(text: str, sample: Sample) -> Parsed:
    """The whole output, blanks off its ends, is the answer (``"whole"``)."""
    answer = text.strip()
    return Parsed(answer, "whole") if answer else Parsed(None)


def free_text(text: str, sample: Sample) -> Parsed:
    """The whole output, normalised, is the answer (``"whole"``)."""
    answer = plain_text(text)
    return Parsed(answer, "whole") if answer else Parsed(None)


def letter(text: str, sample: Sample) -> Parsed:
    """The letter that the output names; rules of :func:`parse_letter`."""
    return Parsed(*parse_letter(text, sample.choices))


def first_class(text: str, sample: Sample) -> Parsed:
    """The first of the class numbers, best first, separated by blanks (``"top1"``)."""
    numbers = text.split()
    if numbers and all(number.isdecimal() for number in numbers):
        return Parsed(numbers[0], "top1")
    return Parsed(None)


def score_text(sample: Sample, parsed: Parsed) -> float:
    """Return 1 if the normalised texts are equal."""
    return exact_match(parsed.answer or "", sample.answers)


def score_letter(sample: Sample, parsed: Parsed) -> float:
    """Return 1 if the letter is right."""
    right = {answer_letter(answer, sample.choices) for answer in sample.answers}
    return float(parsed.answer in right)


def score_class(sample: Sample, parsed: Parsed) -> float:
    """Return 1 if the class is right."""
    return float(parsed.answer in sample.answers)


def _vqa(variant: str) -> Scoring:
    return Scoring(
        whole_output,
        lambda sample, parsed: vqa_accuracy(
            parsed.answer or "",
            sample.answers,
            variant,  # type: ignore[arg-type]
        ),
    )


SCORINGS = {
    "exact_match": Scoring(free_text, score_text),
    "letter_match": Scoring(letter, score_letter, multiple_choice=True),
    "vqa_official": _vqa("official"),
    "vqa_evalai": _vqa("evalai"),
    "vqa_vlmevalkit": _vqa("vlmevalkit"),
    "vqa_lmms-eval": _vqa("lmms-eval"),
    "gqa": Scoring(
        whole_output, lambda sample, parsed: gqa_match(parsed.answer or "", sample.answers)
    ),
    "top1": Scoring(first_class, score_class, generates=False),
}
