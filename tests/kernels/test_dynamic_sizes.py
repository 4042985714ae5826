# SPDX-License-Identifier: Apache-2.0
"""One graph serves all sizes: what an operator checks may not fix a length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from visprune import ops

SIDES = range(8, 18)


def idx(n: int, width: int, keys: int) -> Tensor:
    found = torch.rand(1, 2, n, keys, generator=torch.Generator().manual_seed(0))
    return found.topk(width).indices.sort().values


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# name: (the call, its tensors for a side)
CALLS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "neighborhood_attention": (
        lambda q: ops.neighborhood_attention(q, q, q, 3, dilation=2),
        lambda n: (tokens(1, n, n + 1, 2, 8),),
    ),
    "na_qk": (lambda q: ops.na_qk(q, q, 3), lambda n: (tokens(1, n, n + 1, 2, 8),)),
    "na_av": (
        lambda a, v: ops.na_av(a, v, 3),
        lambda n: (tokens(1, n, n + 1, 2, 9), tokens(1, n, n + 1, 2, 8)),
    ),
    "hilo_attention": (
        lambda q, m: ops.hilo_attention(q, q, q, q, m, m),
        lambda n: (tokens(1, n, n + 1, 2, 8), tokens(1, n // 2, n // 2, 2, 8)),
    ),
    "attention_rows": (
        lambda q, k: ops.attention_rows(q, k, reduce="mean"),
        lambda n: (tokens(1, 2, 2, 8), tokens(1, 2, n * n, 8)),
    ),
    "column_sums": (lambda q: ops.column_sums(q, q), lambda n: (tokens(1, 2, n * n, 8),)),
    "sparse_attention": (
        lambda q, i: ops.sparse_attention(q, q, q, i, dense_queries=1),
        lambda n: (tokens(1, 2, n * n + 1, 8), idx(n * n, 4, n * n + 1)),
    ),
    "lowrank_topk": (
        lambda c, b: ops.lowrank_topk(c, b, 5),
        lambda n: (tokens(1, 2, n * n, 4), tokens(4, n * n)),
    ),
    "greedy_diverse": (lambda x: ops.greedy_diverse(x, 5), lambda n: (tokens(2, n * n, 8),)),
    "gather_tokens": (
        ops.gather_tokens,
        lambda n: (tokens(1, n * n, 8), torch.arange(n)[None].clone()),
    ),
    "bipartite_match": (
        lambda x: ops.bipartite_match(x, 8)[0],
        lambda n: (tokens(1, n * n, 8),),
    ),
    "bipartite_pairs": (
        lambda x: ops.bipartite_pairs(x, 8, prefix=1),
        lambda n: (tokens(1, n * n, 8),),
    ),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_graphs_do_not_grow_with_the_sizes(name: str) -> None:
    call, make = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for side in SIDES:
        given = make(side)
        torch.testing.assert_close(compiled(*given), call(*given))
    assert counter.frame_count <= 3, f"{counter.frame_count} graphs for {len(SIDES)} sizes"
