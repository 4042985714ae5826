# SPDX-License-Identifier: Apache-2.0
"""Intervals: known values, coverage, and clusters that matter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visprune.errors import ConfigError
from visprune.eval.stats import paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_published_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_in_range(case: tuple[int, int]) -> None:
    right, total = case
    low, high = wilson(right, total)
    assert 0.0 <= low <= right / total <= high <= 1.0
    mirrored = wilson(total - right, total)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)


def test_wilson_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for right in rng.binomial(200, 0.9, size=2000):
        low, high = wilson(int(right), 200)
        hits += low <= 0.9 <= high
    assert 0.93 <= hits / 2000 <= 0.97


@pytest.mark.parametrize(("right", "total"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_share(right: int, total: int) -> None:
    with pytest.raises(ConfigError, match=f"got {right} of {total}"):
        wilson(right, total)


def test_confidence_is_a_probability() -> None:
    with pytest.raises(ConfigError, match="confidence lies in"):
        wilson(1, 2, confidence=95)


def test_bootstrap_of_equal_answers_is_zero_and_pairing_matters() -> None:
    rng = np.random.default_rng(1)
    control = (rng.random(400) < 0.5).tolist()
    same = paired_bootstrap(control, control)
    assert (same.delta, same.low, same.high) == (0.0, 0.0, 0.0)
    # Ten questions lost of 400: clearly below zero when paired; unpaired noise would be +-7 points.
    worse = list(control)
    for number in np.flatnonzero(control)[:10]:
        worse[number] = False
    lost = paired_bootstrap(worse, control)
    assert lost.delta == pytest.approx(-10 / 400)
    assert lost.low < lost.delta < lost.high < 0.0
    assert lost.high - lost.low < 0.04


def test_bootstrap_is_deterministic_and_follows_its_seed() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(100).tolist(), rng.random(100).tolist()
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)


def test_bootstrap_matches_the_normal_interval_and_clusters_widen_it() -> None:
    rng = np.random.default_rng(5)
    per_picture = rng.normal(size=200)
    treated = np.repeat(per_picture, 5).tolist()
    clusters = np.repeat(np.arange(200), 5).tolist()
    control = [0.0] * 1000
    alone = paired_bootstrap(treated, control)
    together = paired_bootstrap(treated, control, clusters)
    expected = 2 * 1.96 * per_picture.std() / np.sqrt(200)
    assert together.high - together.low == pytest.approx(expected, rel=0.1)
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(
        np.sqrt(5), rel=0.15
    )


def test_bootstrap_refuses_lengths_that_differ() -> None:
    with pytest.raises(ConfigError, match="2 treated, 3 control"):
        paired_bootstrap([1, 0], [1, 0, 1])
    with pytest.raises(ConfigError, match="0 treated"):
        paired_bootstrap([], [])
