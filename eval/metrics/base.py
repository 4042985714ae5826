# SPDX-License-Identifier: Apache-2.0
"""What the metrics share: sums that add up over processes, and how references are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from visprune.errors import ConfigError, did_you_mean

__all__ = ["AnswerMetric", "check_variant", "paired", "percent", "references_of"]


class AnswerMetric(torchmetrics.Metric):
    """Base of the metrics over texts: ``update(predictions, references)``, then ``compute()``.

    A prediction is a model's output as it came. A reference is a text, several texts (a list), or a
    :class:`visprune.eval.tasks.base.Sample`. ``compute`` returns a dictionary of plain numbers in
    percent (or points, where points are published); ``"score"`` is the headline. Every state is a
    sum, so distributed processes and merged shards give what one process gives.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    count: Tensor
    unparsed: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("unparsed", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def score_one(self, prediction: str, reference: Any) -> float:
        """Return the score of one prediction, in [0, 1]."""
        raise NotImplementedError  # pragma: no cover - abstract

    def is_parsed(self, prediction: str, reference: Any) -> bool:
        """Return whether an answer was found in a prediction; any text is one by default."""
        return bool(prediction.strip())

    def update(self, predictions: Sequence[str], references: Sequence[Any]) -> None:
        """Add predictions and what they are compared with, one for one.

        Raises:
            ConfigError: the two differ in length, or a single text stands for a list.
        """
        pairs = paired(predictions, references)
        self.total += sum(self.score_one(text, reference) for text, reference in pairs)
        self.unparsed += sum(not self.is_parsed(text, reference) for text, reference in pairs)
        self.count += len(pairs)

    def compute(self) -> dict[str, float]:
        """Return ``score`` and ``unparsed`` in percent, and ``count``; NaN before any update."""
        count = int(self.count)
        return {
            "score": percent(float(self.total), count),
            "unparsed": percent(int(self.unparsed), count),
            "count": float(count),
        }


def percent(part: float, whole: float) -> float:
    """Return ``100 * part / whole``, NaN where there is nothing."""
    return 100.0 * part / whole if whole else float("nan")


def paired(predictions: Sequence[str], references: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return predictions beside references.

    Raises:
        ConfigError: the two differ in length, or a single text stands for a list.
    """
    for what, value in (("predictions", predictions), ("references", references)):
        if isinstance(value, str):
            raise ConfigError(f"{what} is one text, {value[:40]!r}; pass a list of them.")
    if len(predictions) != len(references):
        raise ConfigError(
            f"{len(predictions)} predictions and {len(references)} references; pass as many of "
            f"each, in the same order."
        )
    return list(zip(predictions, references, strict=True))


def references_of(reference: Any) -> tuple[str, ...]:
    """Return the reference texts of a text, a list of texts, or a ``Sample``.

    The list may be VQA's own, of ``{"answer": text, "answer_confidence": ..., "answer_id": ...}``.
    """
    if isinstance(reference, str):
        return (reference,)
    found = getattr(reference, "answers", reference)
    return tuple(item["answer"] if isinstance(item, Mapping) else item for item in found)


def check_variant(metric: str, option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of the named variants."""
    if value not in allowed:
        raise ConfigError(
            f"{metric} has no {option} {value!r}.{did_you_mean(str(value), allowed)} "
            f"Allowed: {', '.join(allowed)}."
        )
