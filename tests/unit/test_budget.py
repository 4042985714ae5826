# SPDX-License-Identifier: Apache-2.0
"""A budget is what is kept, of one image."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visprune.core.budget import Budget, StepBudget
from visprune.errors import BudgetError

counts = st.integers(1, 5000)
ratios = st.floats(0.0, 1.0, exclude_min=True)


@given(st.integers(1, 6000), counts)
def test_num_keep_is_clamped(keep: int, count: int) -> None:
    budget = Budget(num_keep=keep)
    assert budget.resolve(count) == min(keep, count)
    if keep > count:
        with pytest.raises(BudgetError, match=f"num_keep={keep} exceeds the {count} visual tokens"):
            budget.resolve(count, strict=True)
    else:
        assert budget.resolve(count, strict=True) == keep


@given(ratios, counts)
def test_keep_ratio_lies_between_one_and_all(ratio: float, count: int) -> None:
    for rounding in ("round", "floor"):
        kept = Budget(keep_ratio=ratio, rounding=rounding).resolve(count, strict=True)
        assert 1 <= kept <= count
        assert abs(kept - max(1.0, ratio * count)) <= 1.0


@given(counts)
def test_all_is_all(count: int) -> None:
    assert Budget(keep_ratio=1.0).resolve(count) == count
    assert Budget(keep_ratio=1.0, rounding="floor").resolve(count) == count


@pytest.mark.parametrize(
    ("ratio", "count", "rounded", "floored"),
    [(0.5, 25, 12, 12), (0.5, 27, 14, 13), (0.1, 10, 1, 1), (0.29, 100, 29, 29), (0.001, 10, 1, 1),
     (0.7, 50, 35, 35), (0.33, 50, 16, 16), (0.25, 576, 144, 144), (0.0567, 576, 33, 32)],
)  # fmt: skip
def test_rounding(ratio: float, count: int, rounded: int, floored: int) -> None:
    assert Budget(keep_ratio=ratio).resolve(count) == rounded
    # Rounding error of the product takes no token away: 0.29 * 100 is 28.999999999999996.
    assert Budget(keep_ratio=ratio, rounding="floor").resolve(count) == floored


@given(ratios, counts)
def test_floor_never_exceeds_the_share(ratio: float, count: int) -> None:
    kept = Budget(keep_ratio=ratio, rounding="floor").resolve(count)
    assert kept == max(1, math.floor(ratio * count + 1e-9))


def test_scaled() -> None:
    assert Budget(num_keep=10).scaled(4.0, "floor") == Budget(num_keep=40, rounding="floor")
    assert Budget(keep_ratio=0.125).scaled(4.0, "floor") == Budget(keep_ratio=0.5, rounding="floor")
    assert Budget(keep_ratio=0.5).scaled(4.0, "floor").keep_ratio == 1.0
    assert Budget(num_keep=1).scaled(0.25, "round").num_keep == 1


@given(st.integers(0, 400), st.integers(1, 200), st.integers(0, 200))
def test_a_step_drops_at_most_half_of_what_enters(r: int, entering: int, before: int) -> None:
    left = StepBudget(num_drop=r).resolve(entering, entering + before)
    assert left == entering - min(r, entering // 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "got neither. Give exactly one"),
        ({"num_keep": 1, "keep_ratio": 0.1}, "got both: num_keep=1, keep_ratio=0.1"),
        ({"num_keep": 0}, "at least 1, got 0"),
        ({"num_keep": 1.0}, "whole number of tokens, got 1.0"),
        ({"num_keep": True}, "whole number of tokens, got True"),
        ({"keep_ratio": 0}, r"in \(0, 1\]; got 0"),
        ({"keep_ratio": 1.01}, r"got 1.01. To keep a number of tokens, use num_keep"),
        ({"keep_ratio": 64}, r"got 64"),
        ({"keep_ratio": float("nan")}, r"got nan"),
        ({"keep_ratio": "0.5"}, r"got '0.5'"),
        ({"keep_ratio": True}, r"got True"),
    ],
)
def test_bad_budgets(params: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**params)
