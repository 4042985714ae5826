# SPDX-License-Identifier: Apache-2.0
"""VQA soft accuracy (arXiv:1505.00468) by the official code, and the variants in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from visprune.errors import ConfigError
from visprune.eval.metrics.base import AnswerMetric, check_variant, references_of
from visprune.eval.metrics.vqa_text import NORMALISERS, tidy

__all__ = ["VQAAccuracy", "VQAVariant", "vqa_accuracy"]

VQAVariant = Literal["official", "evalai", "vlmevalkit", "lmms-eval"]


def vqa_accuracy(
    prediction: str, answers: Sequence[str], variant: VQAVariant = "official"
) -> float:
    """Return the soft accuracy of one prediction against the answers of several people.

    For each person: the share, up to 1, of three *other* people who said the same; then the mean.
    With ten people, k matches give 0, 0.3, 0.6, 0.9, 1.0, 1.0 ...

    Args:
        prediction: the model's output.
        answers: one per person, ten in VQAv2, TextVQA and VizWiz.
        variant: ``"official"``: GT-Vision-Lab's evaluator; where all people say the same, texts are
            compared as they are, case and punctuation included. ``"evalai"``: EvalAI's processor
            (LLaVA; lmms-eval's TextVQA and VizWiz). ``"vlmevalkit"``: the official steps with the
            period rule mended. ``"lmms-eval"``: its VQAv2, the official steps. These three always
            normalise.

    Raises:
        ConfigError: an unknown variant, or no answers.
    """
    check_variant("VQAAccuracy", "variant", variant, tuple(NORMALISERS))
    if not answers:
        raise ConfigError("vqa_accuracy needs the answers of people, ten as a rule; got none.")
    given, said = tidy(prediction), [tidy(answer) for answer in answers]
    if variant != "official" or len(set(said)) > 1:
        normalise = NORMALISERS[variant]
        given, said = normalise(given), [normalise(answer) for answer in said]
    matches = sum(answer == given for answer in said)
    shares = (min(1.0, (matches - (answer == given)) / 3) for answer in said)
    return sum(shares) / len(said)


class VQAAccuracy(AnswerMetric):
    """VQA soft accuracy over questions, in percent.

    Args:
        variant: ``"official"``, ``"evalai"``, ``"vlmevalkit"`` or ``"lmms-eval"``; see
            :func:`vqa_accuracy`.

    Raises:
        ConfigError: unknown variant.

    Example:
        >>> metric = VQAAccuracy(variant="official")
        >>> metric.update(["Two"], [["2"] * 9 + ["3"]])
        >>> metric.compute()["score"]
        100.0
    """

    def __init__(self, variant: VQAVariant = "official", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant("VQAAccuracy", "variant", variant, tuple(NORMALISERS))
        self.variant: VQAVariant = variant

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return the soft accuracy."""
        return vqa_accuracy(prediction, references_of(reference), self.variant)
