# SPDX-License-Identifier: Apache-2.0
"""Reading documents, charts and scene text: ANLS, relaxed accuracy, OCRBench's containment.

Facts from lmms-eval at 75571cf (``api/metrics.py``, ``chartqa/utils.py``, ``ocrbench/utils.py``)
and VLMEvalKit at e8e78f0 (``vqa_eval.py``, ``image_vqa.py``); ``tests/golden/anls_docvqa``,
``relaxed_chartqa`` and ``ocrbench`` hold what they return.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, Literal

from visprune.eval.metrics.base import AnswerMetric, check_variant, references_of

__all__ = [
    "ANLS",
    "READING_VARIANTS",
    "ReadingVariant",
    "RelaxedAccuracy",
    "anls",
    "contains_answer",
    "edit_distance",
    "relaxed_match",
]

ReadingVariant = Literal["lmms-eval", "vlmevalkit"]
READING_VARIANTS = ("lmms-eval", "vlmevalkit")
_ANLS_LEAST = 0.5
_TOLERANCE = 0.05


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance of two texts."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for place, sign in enumerate(first, start=1):
        before, row[0] = row[0], place
        for column, other in enumerate(second, start=1):
            change = before + (sign != other)
            before = row[column]
            row[column] = min(change, row[column] + 1, row[column - 1] + 1)
    return row[-1]


def anls(prediction: str, answers: Sequence[str], variant: ReadingVariant = "lmms-eval") -> float:
    """Return the average normalised Levenshtein similarity of one prediction, in [0, 1].

    1 less the smallest share of edits over the answers; 0 where that is below one half. Case and
    runs of blanks do not count, the length that a distance is divided by is that of the texts as
    they are.

    Args:
        prediction: the model's output.
        answers: the references.
        variant: ``"lmms-eval"`` takes blanks off the prediction's ends, ``"vlmevalkit"`` does not.

    Raises:
        ConfigError: unknown variant.
    """
    check_variant("ANLS", "variant", variant, READING_VARIANTS)
    given = prediction.strip() if variant == "lmms-eval" else prediction
    least = min((_edits(given, answer) for answer in answers), default=1.0)
    return 1.0 - least if 1.0 - least >= _ANLS_LEAST else 0.0


def _edits(given: str, answer: str) -> float:
    """Return the edits between two texts as a share of the longer one."""
    longest = max(len(given.upper()), len(answer.upper()))
    if not longest:
        return 0.0
    first, second = (" ".join(text.lower().split()) for text in (given, answer))
    # So many edits at least; beyond one half the score is 0, and long outputs cost nothing.
    least = abs(len(first) - len(second)) / longest
    return least if 1.0 - least < _ANLS_LEAST else edit_distance(first, second) / longest


class ANLS(AnswerMetric):
    """Mean of :func:`anls` over questions, in percent (arXiv:1905.13648).

    Args:
        variant: see :func:`anls`.

    Raises:
        ConfigError: unknown variant.
    """

    def __init__(self, variant: ReadingVariant = "lmms-eval", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant("ANLS", "variant", variant, READING_VARIANTS)
        self.variant: ReadingVariant = variant

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return the similarity."""
        return anls(prediction, references_of(reference), self.variant)


def relaxed_match(prediction: str, answer: str, variant: ReadingVariant = "lmms-eval") -> float:
    """Return 1 for the same number within 5 %, or the same text in any case, else 0.

    "57%" is 0.57, "1,000" is no number; a reference of zero wants the same text. Published slips
    stay: years are numbers (1910 is right for 2011), and rounding decides at exactly 5 %.

    Args:
        prediction: the model's output.
        answer: the reference.
        variant: ``"lmms-eval"``; ``"vlmevalkit"``: a reference that is the text of a list is one of
            its items.

    Raises:
        ConfigError: unknown variant.
    """
    check_variant("RelaxedAccuracy", "variant", variant, READING_VARIANTS)
    targets = [answer] if variant == "lmms-eval" else _items(answer)
    return float(any(_relaxed(prediction.strip(), target) for target in targets))


def _items(answer: str) -> list[str]:
    """Return the items of a reference that is the text of a Python list, else the reference."""
    if answer.startswith("[") and answer.endswith("]"):
        try:
            found = ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [answer]
        if isinstance(found, list):
            return [str(item) for item in found]
    return [answer]


def _relaxed(given: str, target: str) -> bool:
    number, wanted = _number(given), _number(target)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= _TOLERANCE
    return given.lower() == target.lower()


def _number(text: str) -> float | None:
    """Return a text as Python reads a number, a percent sign after it as a hundredth."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


class RelaxedAccuracy(AnswerMetric):
    """Share of :func:`relaxed_match` over questions, in percent (arXiv:2203.10244).

    Args:
        variant: see :func:`relaxed_match`.

    Raises:
        ConfigError: unknown variant.
    """

    def __init__(self, variant: ReadingVariant = "lmms-eval", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant("RelaxedAccuracy", "variant", variant, READING_VARIANTS)
        self.variant: ReadingVariant = variant

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return 1 where one of the references fits."""
        return max(
            relaxed_match(prediction, text, self.variant) for text in references_of(reference)
        )


# Full-width ASCII and the ideographic blank.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def contains_answer(
    prediction: str, answers: Sequence[str], *, expression: bool = False,
    variant: ReadingVariant = "lmms-eval",
) -> float:  # fmt: skip
    """Return 1 if OCRBench finds one of the answers in a prediction (arXiv:2305.07895).

    There is no word boundary: "1200" holds "120". An empty answer is in everything.

    Args:
        prediction: the model's output.
        answers: the references.
        expression: of a handwritten formula: blanks do not count, case does.
        variant: ``"lmms-eval"`` folds full-width letters, ``"vlmevalkit"`` does not.

    Raises:
        ConfigError: unknown variant.
    """
    check_variant("OCRBench", "variant", variant, READING_VARIANTS)

    def clean(text: str) -> str:
        text = text.strip().replace("\n", " ")
        if expression:
            return text.replace(" ", "")
        folded = text.translate(_FULL_WIDTH) if variant == "lmms-eval" else text
        return folded.lower().strip()

    given = clean(prediction)
    return float(any(clean(answer) in given for answer in answers))
