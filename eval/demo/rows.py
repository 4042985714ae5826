# SPDX-License-Identifier: Apache-2.0
"""The demo's rows, from the records of its study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from visprune.eval.models.base import NONE
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.record import Cell, Record
from visprune.eval.stats import paired_bootstrap, wilson

__all__ = ["Measured", "build_rows"]

SEED = 0
_PARTS = ("vision", "projector", "selection", "prefill", "lm_head")


class Measured:
    """What a study of one model and task left, cell by cell, the same questions in each.

    Args:
        folder: its results.

    Attributes:
        cells: by label, in the order of the study.
        records: of each, sorted by sample.
        speed: latency of each at batch 1.
    """

    def __init__(self, folder: ResultsFolder) -> None:
        self.cells: dict[str, Cell] = {cell.label: cell for cell in folder.cells().values()}
        labels = {cell.id: label for label, cell in self.cells.items()}
        self.records: dict[str, list[Record]] = {label: [] for label in self.cells}
        for record in folder.records():
            self.records[labels[record.cell]].append(record)
        self.speed = {labels[cell]: values for cell, values in folder.speed().items()}

    @property
    def whole(self) -> str:
        """Label of the row that the others are compared with."""
        return "keep_all"

    @property
    def rows(self) -> list[str]:
        """Labels of the table's rows; keep_all first, the untouched model has none."""
        return [self.whole, *(name for name in self.cells if name not in (NONE, self.whole))]

    def right(self, label: str) -> np.ndarray:
        """Which questions were answered rightly, ``[n]`` bool."""
        return np.asarray([record.score == 1.0 for record in self.records[label]])

    def kinds(self) -> Counter[str]:
        """Questions of each kind."""
        return Counter(record.kind for record in self.records[self.whole])

    def clusters(self) -> list[str]:
        """The picture of each question."""
        return [record.cluster for record in self.records[self.whole]]

    def prefill_ms(self, label: str) -> dict[str, float]:
        """``median``, ``q1`` and ``q3``; picture included."""
        return dict(self.speed[label]["batch"]["1"]["prefill_ms"])

    def kv_mib(self, label: str) -> float:
        """Keys and values after a prefill, read off the cache."""
        return float(self.speed[label]["kv_bytes"]) / 2**20


def build_rows(measured: Measured) -> list[dict[str, Any]]:
    """Return one row of ``demo.json`` per method and budget; the first one is keep_all.

    Shares are in [0, 1]; ``delta`` is accuracy minus keep_all's on the same questions, its interval
    from a bootstrap over pictures; ``gflops`` per question, its picture's encoding included;
    ``prefill_ms`` a median with batch 1; ``speedup`` against the untouched model.
    """
    return [_row(measured, label) for label in measured.rows]


def _row(measured: Measured, label: str) -> dict[str, Any]:
    cell, records = measured.cells[label], measured.records[label]
    right, whole = measured.right(label), measured.right(measured.whole)
    paired = paired_bootstrap(right.tolist(), whole.tolist(), measured.clusters(), seed=SEED)
    parts = {part: 2 * _mean([(r.macs or {})[part] for r in records]) / 1e9 for part in _PARTS}
    kinds = np.asarray([record.kind for record in records])
    prefill = measured.prefill_ms(label)
    texts = [[record.text for record in measured.records[name]] for name in (label, measured.whole)]
    return {
        "method": cell.method["method"],
        "num_keep": cell.num_keep or round(_mean([record.tokens or 0.0 for record in records])),
        "accuracy": float(right.mean()),
        "ci95": list(wilson(int(right.sum()), len(right))),
        "delta": paired.delta,
        "delta_ci95": [paired.low, paired.high],
        "tokens_mean": _mean([record.tokens or 0.0 for record in records]),
        "gflops": sum(parts.values()),
        "prefill_ms": prefill["median"],
        "speedup": measured.prefill_ms(NONE)["median"] / prefill["median"],
        "kv_mib": measured.kv_mib(label),
        "prefill_iqr_ms": prefill["q3"] - prefill["q1"],
        "n": len(right),
        "agreement": _mean([a == b for a, b in zip(*texts, strict=True)]),
        "gflops_parts": parts,
        "per_kind": {kind: float(right[kinds == kind].mean()) for kind in measured.kinds()},
        "parameters": dict(cell.method),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
