# SPDX-License-Identifier: Apache-2.0
"""Numbers of numpy are numbers: sizes and budgets come out of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import visprune
from visprune import ops
from visprune.errors import ConfigError

X = torch.randn(1, 6, 6, 2, 4, generator=torch.Generator().manual_seed(0))
ROWS = X.flatten(1, 2).transpose(1, 2)  # [1, 2, 36, 4]
KEYS = torch.arange(4).expand(1, 2, 36, 4)
BLOCKS = torch.ones(1, 1, 6, 6, dtype=torch.bool)

CALLS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "kernel": lambda n: ops.neighborhood_attention(X, X, X, n(3), n(2), n(2)),
    "kernels": lambda n: ops.neighborhood_attention(X, X, X, (n(3), n(2)), is_causal=n(True)),
    "array": lambda n: ops.na_qk(X, X, [n(3), n(4)], is_causal=(n(True), n(False))),
    "na_av": lambda n: ops.na_av(X.repeat(1, 1, 1, 1, 4)[..., :9], X, n(3)),
    "hilo_attention": lambda n: ops.hilo_attention(X, X, X, X, X, X, window_size=n(2)),
    "hilo_pool": lambda n: ops.hilo_pool(X.flatten(3), n(2)),
    "greedy_diverse": lambda n: ops.greedy_diverse(ROWS[0], n(3), pivot=n(1)),
    "dense_queries": lambda n: ops.sparse_attention(ROWS, ROWS, ROWS, KEYS[:, :, 1:],
                                                    dense_queries=n(1)),
    "block_size": lambda n: ops.sparse_attention(ROWS, ROWS, ROWS, block_mask=BLOCKS,
                                                 block_size=n(6)),
    "lowrank_topk": lambda n: ops.lowrank_topk(ROWS, torch.ones(4, 9).cumsum(1), n(3)),
    "bipartite_match": lambda n: ops.bipartite_match(ROWS[0], n(3))[0],
    "bipartite_pairs": lambda n: ops.bipartite_pairs(ROWS[0], n(3), prefix=n(1))[0],
    "reduce_tokens": lambda n: ops.reduce_tokens(ROWS[0], n(36), source=KEYS[0, :, :, 0]),
    "merge_tokens": lambda n: ops.merge_tokens(ROWS[0], KEYS[0, :, :, 0], n(1)),
    "column_sums": lambda n: ops.column_sums(ROWS, ROWS, block=n(5)),
}  # fmt: skip


def of_numpy(value: Any) -> Any:
    return np.bool_(value) if isinstance(value, bool) else np.int64(value)


@pytest.mark.parametrize("name", CALLS)
def test_operators_take_numbers_of_numpy(name: str) -> None:
    got, want = CALLS[name](of_numpy), CALLS[name](lambda value: value)
    assert isinstance(want, Tensor)
    assert torch.equal(got, want)


def test_a_whole_array_is_one_number_for_each_axis() -> None:
    want = ops.neighborhood_attention(X, X, X, (3, 2))
    assert isinstance(want, Tensor)
    assert torch.equal(ops.neighborhood_attention(X, X, X, np.array([3, 2])), want)


@pytest.mark.parametrize("value", [np.float64(3), 3.0, "3", None, np.array([3, 3, 3])])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="kernel_size must be one int or one for each of 2 axes"):
        ops.neighborhood_attention(X, X, X, value)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("tome", {"r": 4}),
        ("tome", {"r": [4, 3]}),
        ("topk", {"num_keep": 9}),
        ("evit", {"keep_ratio": 0.5}),
        ("dynamicvit", {"num_keep": 4, "layers": [1, 2]}),
    ],
)
def test_methods_take_numbers_of_numpy(method: str, params: dict[str, Any]) -> None:
    given = {
        key: [*np.array(value)] if isinstance(value, list) else np.array(value)[()]
        for key, value in params.items()
    }
    got, want = visprune.get_method(method, **given), visprune.get_method(method, **params)
    assert got == want
    assert repr(got) == repr(want)
