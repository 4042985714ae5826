# SPDX-License-Identifier: Apache-2.0
"""Top-k accuracy of class numbers, from logits or from rankings written as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from visprune.errors import ConfigError
from visprune.eval.metrics.base import percent, references_of

__all__ = ["TopK", "parse_ranking"]


def parse_ranking(text: str) -> tuple[int, ...]:
    """Return the class numbers of an output, best first; empty where it holds anything else."""
    numbers = text.split()
    if not all(number.isdecimal() for number in numbers):
        return ()
    return tuple(map(int, numbers))


class TopK(torchmetrics.Metric):
    """Top-1 and top-5 accuracy in percent: ``score`` (top-1), ``top1``, ``top5``.

    Predictions are logits ``[B, C]`` (or ``[B, k]`` rankings, integers, best first), or texts such
    as ``"12 5 7 1 9"``; references are class numbers (a tensor ``[B]``, numbers, texts, samples).

    Args:
        ks: the k of "top-k", each at least 1.

    Raises:
        ConfigError: no k, or one below 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    right: Tensor
    count: Tensor

    def __init__(self, ks: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ks or min(ks) < 1:
            raise ConfigError(f"ks are numbers from 1, such as (1, 5); got {tuple(ks)}.")
        self.ks = tuple(ks)
        self.add_state("right", torch.zeros(len(self.ks), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor | Sequence[str], references: Any) -> None:
        """Add predictions and classes.

        Raises:
            ConfigError: lengths differ.
        """
        if isinstance(predictions, Tensor):
            k = min(max(self.ks), predictions.shape[-1])
            ranked = predictions[:, :k]
            if predictions.is_floating_point():
                ranked = predictions.topk(k, dim=-1).indices
            rankings: list[tuple[int, ...]] = [tuple(row) for row in ranked.tolist()]
        else:
            rankings = [parse_ranking(text) for text in predictions]
        labels = references.tolist() if isinstance(references, Tensor) else list(references)
        if len(rankings) != len(labels):
            raise ConfigError(f"{len(rankings)} predictions and {len(labels)} references.")
        for ranking, label in zip(rankings, labels, strict=True):
            truth = label if isinstance(label, int) else int(references_of(label)[0])
            for number, k in enumerate(self.ks):
                self.right[number] += truth in ranking[:k]
        self.count += len(labels)

    def compute(self) -> dict[str, float]:
        """Return the figures; NaN before any update."""
        values = [percent(right, int(self.count)) for right in self.right.tolist()]
        figures = {f"top{k}": value for k, value in zip(self.ks, values, strict=True)}
        return {"score": values[0], **figures}
