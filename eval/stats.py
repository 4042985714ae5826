# SPDX-License-Identifier: Apache-2.0
"""Intervals: Wilson's for a share, a bootstrap over clusters for a paired difference."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from visprune.errors import ConfigError

__all__ = ["PairedDifference", "paired_bootstrap", "wilson"]


def wilson(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; it stays in [0, 1] and is sound at 0 % and 100 %.

    Args:
        right: successes.
        total: trials, at least 1.
        confidence: of the interval, in (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        ConfigError: no trials, more successes than trials, or a confidence out of range.
    """
    if total < 1 or not 0 <= right <= total:
        raise ConfigError(f"wilson takes 0 <= right <= total, total >= 1; got {right} of {total}.")
    z = _quantile(confidence)
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # At 0 and at all, the end is exact; rounding would leave it a hair inside.
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == total else middle + half
    return low, high


def _quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence lies in (0, 1), such as 0.95; got {confidence}.")
    return NormalDist().inv_cdf((1 + confidence) / 2)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``treated - control`` over the same questions, with its interval.

    Attributes:
        delta: the mean difference.
        low: lower end of the interval.
        high: upper end.
    """

    delta: float
    low: float
    high: float


def paired_bootstrap(
    treated: Sequence[float],
    control: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Percentile bootstrap of a paired difference.

    Questions about one picture share its luck, so whole pictures are drawn, not questions.

    Args:
        treated: score of each question under a method, ``[n]``.
        control: score of the same questions under what it is compared with, ``[n]``.
        clusters: the picture of each question; ``None``: every question stands alone.
        resamples: draws.
        confidence: of the interval.
        seed: of the draws.

    Raises:
        ConfigError: nothing to compare, lengths that differ, or a confidence out of range.
    """
    _quantile(confidence)
    names = range(len(treated)) if clusters is None else clusters
    if not len(treated) == len(control) == len(names) or not len(treated) or resamples < 1:
        raise ConfigError(
            f"paired_bootstrap compares the same questions: got {len(treated)} treated, "
            f"{len(control)} control, {len(names)} clusters, {resamples} resamples."
        )
    difference = np.asarray(treated, np.float64) - np.asarray(control, np.float64)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    member = np.asarray([number[name] for name in names])
    totals = np.bincount(member, difference)  # [clusters]
    counts = np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts)))
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return PairedDifference(float(difference.mean()), float(low), float(high))
