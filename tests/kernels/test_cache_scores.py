# SPDX-License-Identifier: Apache-2.0
"""The two signals of cache eviction from ``attention_rows`` and ``column_sums``, never N x N.

SnapKV: what the last W queries give to each slot of the prefix, per key head. H2O: what all queries
together have given. Both under grouped heads, left padding and causality.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visprune import ops

BATCH, HEADS, KV, DIM = 2, 6, 2, 16
PADDING = (0, 5)  # of each row, on the left


def queries_keys(n: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(n)
    q = torch.randn(batch, HEADS, n, DIM, generator=gen)
    return q, torch.randn(batch, KV, n, DIM, generator=gen)


def keys_seen(n: int) -> Tensor:
    """[B, 1, 1, N]: False for padding."""
    return (torch.arange(n) >= torch.tensor(PADDING)[:, None])[:, None, None]


def whole_map(q: Tensor, k: Tensor, seen: Tensor, hidden: Tensor | None = None) -> Tensor:
    """The [B, H, N, N] map in fp64 that the operators avoid; rows of padding are zeros."""
    q, k = q.double(), k.double().repeat_interleave(HEADS // KV, 1)
    n = q.shape[2]
    mask = torch.ones(n, n, dtype=torch.bool).tril() & seen
    mask = mask if hidden is None else mask & ~hidden
    scores = (q @ k.mT * DIM**-0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def per_key_head(scores: Tensor) -> Tensor:
    """[B, H, N] -> mean over the group, [B, Hkv, N]."""
    return scores.unflatten(1, (KV, -1)).mean(2)


@pytest.mark.parametrize("window", [1, 8, 23])
def test_scores_of_a_window(window: int) -> None:
    q, k = queries_keys(47)
    seen = keys_seen(47)
    rows = ops.attention_rows(q[:, :, -window:], k, mask=seen, causal=True)
    want = whole_map(q, k, seen)[:, :, -window:]
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-7)
    # Summed over the window without its rows being held: the operator of the columns.
    sums = ops.column_sums(q[:, :, -window:], k, mask=seen, causal=True, reduce="none", block=4)
    torch.testing.assert_close(sums.double(), want.sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_key_head(sums).double(), per_key_head(want.sum(2)))


@pytest.mark.parametrize("block", [1, 7, 128])
def test_scores_of_all_queries(block: int) -> None:
    q, k = queries_keys(47)
    seen = keys_seen(47)
    real = seen[:, 0, 0].float()
    sums = ops.column_sums(
        q, k, mask=seen, causal=True, row_weight=real, reduce="none", block=block
    )
    want = whole_map(q, k, seen).sum(2)
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-6)
    # A sequence hands out one for each of its real queries.
    total = (47 - torch.tensor(PADDING)).float()[:, None].expand(-1, HEADS)
    torch.testing.assert_close(sums.sum(-1), total)
    assert sums[1, :, : PADDING[1]].eq(0).all()


def test_scores_of_the_queries_behind_the_picture() -> None:
    """VL-Cache: the rows of the text after the image, each up to its own position."""
    q, k = queries_keys(40)
    seen, text = keys_seen(40), 12
    sums = ops.column_sums(q[:, :, -text:], k, mask=seen, causal=True, reduce="none")
    torch.testing.assert_close(sums.double(), whole_map(q, k, seen)[:, :, -text:].sum(2))


def test_scores_under_a_mask_of_each_head() -> None:
    """Slots that an earlier eviction took from some heads: [B, H, 1, N] stays as small."""
    q, k = queries_keys(30)
    seen = keys_seen(30)
    hidden = torch.rand(BATCH, HEADS, 1, 30, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden[..., -1:] = False
    mask = seen & ~hidden
    sums = ops.column_sums(q, k, mask=mask, causal=True, reduce="none", block=7)
    want = whole_map(q, k, seen, hidden).sum(2)
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that anything writes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and not t._is_view():
                self.numel = max(self.numel, t.numel())
        return out


def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """Measured inside the PyTorch path, under a key mask and causality."""
    from visprune.kernels.attention_rows import torch_impl

    window, block, seen = 16, 32, {}
    for n in (512, 2048):
        q, k = queries_keys(n, batch=1)
        mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
        last = torch.arange(n - window, n)[None]
        with Largest() as rows:
            torch_impl.attention_rows(q[:, :, -window:], k, 0.25, mask, last, "none", 0.0)
        with Largest() as columns:
            torch_impl.column_sums(q, k, 0.25, mask, True, None, "none", block, 0.0)
        seen[n] = (rows.numel, columns.numel)
        assert rows.numel <= max(HEADS * window * n, q.numel())
        assert columns.numel <= max(HEADS * block * n, q.numel())
    assert [b / a for a, b in zip(seen[512], seen[2048], strict=True)] == [4.0, 4.0]
