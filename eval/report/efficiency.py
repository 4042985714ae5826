# SPDX-License-Identifier: Apache-2.0
"""What an arm cost: operations and bytes from its records, time from its measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visprune.eval.report.read import Line, Outcome

__all__ = ["AXES", "FLOP_PARTS", "TIME_PARTS", "Efficiency", "by_size", "efficiency_of"]

FLOP_PARTS = ("vision", "projector", "selection", "prefill", "decode", "lm_head")
TIME_PARTS = ("vision_ms", "selection_ms", "prefill_ms", "decode_ms_per_token", "total_ms")
# What a plot may put on its x axis; the front is marked on each.
AXES = ("flops", "total_ms", "prefill_ms", "tokens", "kv_bytes")


@dataclass(frozen=True)
class Efficiency:
    """Means over the records of an arm, and medians of its measurements.

    Attributes:
        tokens: visual tokens in the mean over layers.
        flops: by part, per sample, two per multiply-add; empty: not counted.
        kv_bytes: keys and values in the cache.
        new_tokens: tokens generated.
        speed: by batch size, then by part: median, q1, q3 (milliseconds).
        peak_bytes: of GPU memory, at the first batch size; ``None``: not measured.
        measured: the rest of the measurement: rounds, attention, threads, device, environment.
    """

    tokens: float | None
    flops: Mapping[str, float]
    kv_bytes: float | None
    new_tokens: float | None
    speed: Mapping[str, Mapping[str, tuple[float, float, float]]]
    peak_bytes: float | None
    measured: Mapping[str, Any]

    @property
    def total_flops(self) -> float | None:
        """Sum of all parts."""
        return sum(self.flops.values()) if self.flops else None

    @property
    def batches(self) -> list[str]:
        """Measured batch sizes, the smallest first."""
        return sorted(self.speed, key=by_size)

    def time(self, part: str, batch: str | None = None) -> tuple[float, float, float] | None:
        """Median and quartiles of a part, or None where it was not measured.

        Args:
            part: one of :data:`TIME_PARTS`.
            batch: size of the batch; ``None``: the smallest measured.
        """
        chosen = batch or next(iter(self.batches), "1")
        return self.speed.get(chosen, {}).get(part)

    def on(self, axis: str) -> float | None:
        """The cost on one of :data:`AXES`."""
        if axis == "flops":
            return self.total_flops
        if axis in ("tokens", "kv_bytes"):
            return self.tokens if axis == "tokens" else self.kv_bytes
        measured = self.time(axis)
        return measured[0] if measured else None


def by_size(batch: str) -> tuple[float, str]:
    """Order of batch sizes as a file has them; what is no number comes last."""
    return (int(batch) if batch.isdecimal() else float("inf"), batch)


def efficiency_of(lines: Sequence[Line], outcomes: Sequence[Outcome]) -> Efficiency:
    """Average the records of an arm and take the first measurement among its outcomes."""
    macs = [line.macs for line in lines if line.macs]
    parts = [*FLOP_PARTS, *sorted({name for found in macs for name in found} - {*FLOP_PARTS})]
    flops = {
        part: 2 * float(np.mean([found.get(part, 0.0) for found in macs]))
        for part in parts if any(part in found for found in macs)
    }  # fmt: skip
    measured = next((outcome.speed for outcome in outcomes if outcome.speed), {})
    return Efficiency(
        tokens=_mean([line.tokens for line in lines]),
        flops=flops,
        kv_bytes=_mean([line.kv_bytes for line in lines]),
        new_tokens=_mean([line.new_tokens for line in lines]),
        speed=_speed(measured.get("batch")),
        peak_bytes=_number(measured.get("peak_bytes")),
        measured={name: value for name, value in measured.items() if name != "batch"},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _speed(batches: Any) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Read ``{"1": {"vision_ms": {"median", "q1", "q3"}, ...}}``; what is malformed is left out."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for size, parts in batches.items() if isinstance(batches, dict) else ():
        for part, value in parts.items() if isinstance(parts, dict) else ():
            ends = value if isinstance(value, dict) else {"median": value}
            median = ends.get("median")
            if not isinstance(median, int | float) or isinstance(median, bool):
                continue
            quartiles = [
                float(x) if isinstance(x := ends.get(name), int | float) else float(median)
                for name in ("q1", "q3")
            ]
            found.setdefault(str(size), {})[part] = (float(median), quartiles[0], quartiles[1])
    return found
