# SPDX-License-Identifier: Apache-2.0
"""POPE (arXiv:2305.10355): object hallucination by yes/no questions, under three parsers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torchmetrics
from torch import Tensor

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.metrics.base import check_variant, paired, percent, references_of
from visprune.eval.metrics.yesno import POPE_PARSERS, parse_yes_no, yes_no_label

__all__ = ["POPE", "SPLITS", "POPEParser", "pope_cell", "pope_figures"]

POPEParser = Literal["llava", "lmms-eval", "vlmevalkit"]
SPLITS = ("random", "popular", "adversarial")
_ROWS = (*SPLITS, "")
_CELLS = ("tp", "fp", "tn", "fn", "unparsed_yes", "unparsed_no")


def pope_cell(answer: str | None, label: str) -> str:
    """Return which count a parsed answer adds to: ``"tp"``, ``"fp"``, ... ``"unparsed_no"``.

    Raises:
        ConfigError: the label is neither yes nor no.
    """
    truth = yes_no_label(label)
    if truth is None:
        raise ConfigError(f"POPE's labels are 'yes' and 'no', got {label!r}.")
    if answer is None:
        return f"unparsed_{truth}"
    return ("t" if answer == truth else "f") + ("p" if answer == "yes" else "n")


def pope_figures(
    counts: Mapping[str, Mapping[str, int]], parser: POPEParser = "llava"
) -> dict[str, float]:
    """Return POPE's figures in percent from counts.

    Args:
        counts: split (``""``: not named) to count by the names of :func:`pope_cell`.
        parser: the harness whose summary is wanted. An unparsed answer counts as wrong in the
            accuracy of both; lmms-eval leaves it out of precision and recall, VLMEvalKit counts it
            as a miss in the recall.

    Returns:
        ``score``, pooled ``f1``, ``accuracy``, ``precision``, ``recall``, ``yes_rate``,
        ``unparsed``, and ``f1/SPLIT`` and so on where splits are named. The score is an F1:
        for ``"llava"`` the mean over the splits (LLaVA-1.5's 85.9), else of all questions together.
        Precision and F1 are 0 where nothing was answered yes (LLaVA's script divides by zero).
        ``yes_rate`` is that of the answers; ``label_yes_rate`` that of the labels, which is what
        lmms-eval prints as ``pope_yes_ratio``: always 50, whatever the model says.
    """
    pooled = {name: sum(row.get(name, 0) for row in counts.values()) for name in _CELLS}
    if not sum(pooled.values()):
        return {}
    figures = _summary(pooled, parser)
    named = {split: row for split, row in counts.items() if split and sum(row.values())}
    for split, row in named.items():
        figures |= {f"{name}/{split}": value for name, value in _summary(row, parser).items()}
    score = figures["f1"]
    if named and parser == "llava":
        score = sum(figures[f"f1/{split}"] for split in named) / len(named)
    return {"score": score, **figures}


def _summary(row: Mapping[str, int], parser: POPEParser) -> dict[str, float]:
    tp, fp, tn, fn, lost_yes, lost_no = (row.get(name, 0) for name in _CELLS)
    total = tp + fp + tn + fn + lost_yes + lost_no
    missed = fn + (lost_yes if parser == "vlmevalkit" else 0)
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + missed) if tp + missed else 0.0
    both = precision + recall
    return {
        "f1": 100.0 * 2 * precision * recall / both if both else 0.0,
        "accuracy": percent(tp + tn, total),
        "precision": 100.0 * precision,
        "recall": 100.0 * recall,
        "yes_rate": percent(tp + fp, total),
        "label_yes_rate": percent(tp + fn + lost_yes, total),
        "unparsed": percent(lost_yes + lost_no, total),
    }


class POPE(torchmetrics.Metric):
    """POPE's F1, accuracy, precision, recall and yes-rate, in percent.

    References are labels (``"yes"``, ``"no"``) or samples, whose kind is the split.

    Args:
        parser: ``"llava"`` (the official rule: no "no" means yes), ``"lmms-eval"`` (the whole
            output), ``"vlmevalkit"`` (a word); see :mod:`visprune.eval.metrics.yesno`.

    Raises:
        ConfigError: unknown parser.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor

    def __init__(self, parser: POPEParser = "llava", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant("POPE", "parser", parser, POPE_PARSERS)
        self.parser: POPEParser = parser
        zeros = torch.zeros(len(_ROWS), len(_CELLS), dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        splits: Sequence[str] | None = None,
    ) -> None:
        """Add outputs and labels.

        Args:
            predictions: outputs of the model.
            references: labels or samples.
            splits: ``"random"``, ``"popular"`` or ``"adversarial"`` per question; ``None``: the
                samples' kinds, or no split.

        Raises:
            ConfigError: lengths differ, a label is neither yes nor no, or a split is unknown.
        """
        pairs = paired(predictions, references)
        names = splits if splits is not None else [getattr(ref, "kind", "") for ref in references]
        for (text, reference), split in zip(pairs, names, strict=True):
            if split not in _ROWS:
                hint = did_you_mean(split, SPLITS)
                raise ConfigError(
                    f"POPE has no split {split!r}.{hint} Splits: {', '.join(SPLITS)}."
                )
            (label,) = references_of(reference)
            cell = pope_cell(parse_yes_no(text, self.parser)[0], label)
            self.counts[_ROWS.index(split), _CELLS.index(cell)] += 1

    def compute(self) -> dict[str, float]:
        """Return the figures of :func:`pope_figures`."""
        counts = {
            split: dict(zip(_CELLS, row, strict=True))
            for split, row in zip(_ROWS, self.counts.tolist(), strict=True)
        }
        return pope_figures(counts, self.parser)
