# SPDX-License-Identifier: Apache-2.0
"""Sparse attention and low-rank top-k: meaning, paths, ties, compile, memory, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from visprune import ops
from visprune.errors import BudgetError, ConfigError, UnsupportedKernel
from visprune.kernels.sparse_attention import bench, blocks, cases, op, reference, torch_impl


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(n: int, m: int, b: int = 1, h: int = 2, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return seeded(b, h, n, d), seeded(b, h, m, d, seed=1), seeded(b, h, m, d, seed=2)


@given(
    n=st.integers(1, 30), m=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99),
    small=st.booleans(),
)  # fmt: skip
@settings(max_examples=30)
def test_index_equals_dense_attention_under_a_mask(
    n: int, m: int, data: st.DataObject, seed: int, small: bool
) -> None:
    """Also in many small pieces, and by both of the paths."""
    width = data.draw(st.integers(1, m))
    gen = torch.Generator().manual_seed(seed)
    idx = cases.some_keys((2, 2, n), m, width, gen)
    idx = idx.masked_fill(torch.rand(idx.shape, generator=gen) < 0.3, -1)
    q, k, v = qkv(n, m, b=2)
    mask = torch.zeros(2, 2, n, m + 1, dtype=torch.bool).scatter(3, idx % (m + 1), True)[..., :m]
    want = scaled_dot_product_attention(q, k, v, mask).nan_to_num(0.0)
    with pytest.MonkeyPatch.context() as patch:
        for gather_below in (0, 1000):
            patch.setattr(torch_impl, "GATHER_BELOW", gather_below)
            if small:
                patch.setattr(torch_impl, "MAX_SCORES", 7)
                patch.setattr(torch_impl, "MAX_GATHERED", 100)
            got = ops.sparse_attention(q, k, v, idx.to(torch.int32 if small else torch.int64))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@given(
    n=st.integers(1, 40), m=st.integers(1, 40), rows=st.integers(1, 20), cols=st.integers(1, 20),
    seed=st.integers(0, 99), shared=st.booleans(), dense=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=30)
def test_blocks_equal_dense_attention_under_a_mask(
    n: int, m: int, rows: int, cols: int, seed: int, shared: bool, dense: int
) -> None:
    dense = min(dense, n)
    q, k, v = qkv(n, m, b=2)
    shape = (1 if shared else 2, 1 if shared else 2, -(-(n - dense) // rows), -(-m // cols))
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = seen.repeat_interleave(rows, 2)[:, :, : n - dense].repeat_interleave(cols, 3)[..., :m]
    mask = torch.nn.functional.pad(mask, (0, 0, dense, 0), value=True)
    want = scaled_dot_product_attention(q, k, v, mask).nan_to_num(0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MAX_GATHERED", 500)
        got = ops.sparse_attention(
            q, k, v, block_mask=seen, block_size=(rows, cols), dense_queries=dense
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_order_does_not_matter_and_a_key_named_twice_counts_twice() -> None:
    q, k, v = qkv(5, 9)
    idx = cases.some_keys((1, 2, 5), 9, 4, torch.Generator().manual_seed(0))
    base = ops.sparse_attention(q, k, v, idx)
    torch.testing.assert_close(ops.sparse_attention(q, k, v, idx.flip(3)), base)
    twice = torch.cat((idx, idx[..., :1]), 3)
    bias = torch.zeros(1, 2, 5, 9).scatter(3, idx[..., :1], torch.tensor(2.0).log().item())
    bias = bias.masked_fill(torch.zeros(1, 2, 5, 9).scatter(3, idx, 1.0) == 0, -torch.inf)
    want = scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(ops.sparse_attention(q, k, v, twice), want)


def test_all_keys_are_plain_attention_with_its_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(7, 6))
    idx = torch.arange(6).expand(1, 2, 6, 6)
    whole = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    want = scaled_dot_product_attention(q, k, v)
    for got in (
        ops.sparse_attention(q, k, v, idx, dense_queries=1),
        ops.sparse_attention(q, k, v, block_mask=whole),
        ops.sparse_attention(q, k, v, idx[:, :, :0], dense_queries=7),
    ):
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad(got.square().sum(), (q, k, v), retain_graph=True)
        true = torch.autograd.grad(want.square().sum(), (q, k, v), retain_graph=True)
        torch.testing.assert_close(grads, true)


@given(
    rows=st.integers(1, 9), n=st.integers(1, 40), rank=st.integers(1, 4), data=st.data(),
    seed=st.integers(0, 99), levels=st.integers(1, 3), limit=st.sampled_from([None, 0.0, 0.1]),
)  # fmt: skip
@settings(max_examples=40)
def test_topk_with_ties(
    rows: int, n: int, rank: int, data: st.DataObject, seed: int, levels: int, limit: float | None
) -> None:
    """Small integers tie often; in pieces of one row the answer is the same."""
    keep = data.draw(st.integers(0, n))
    gen = torch.Generator().manual_seed(seed)
    coef = torch.randint(-levels, levels + 1, (1, 2, rows, rank), generator=gen).float()
    basis = torch.randint(-levels, levels + 1, (rank, n), generator=gen).float()
    mask = torch.rand(1, n, generator=gen) < 0.8
    want = reference.lowrank_topk(coef, basis[None, None], keep, limit, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, "MAX_SCORES", 1)
        assert torch.equal(ops.lowrank_topk(coef, basis, keep, limit, mask), want)
    assert torch.equal(ops.lowrank_topk(coef, basis, keep, limit, mask), want)


OPCHECKED = {
    "index": torch.ops.visprune.sparse_attention.default,
    "index_missing": torch.ops.visprune.sparse_attention.default,
    "blocks_uneven": torch.ops.visprune.block_sparse_attention.default,
    "topk_masked": torch.ops.visprune.lowrank_topk.default,
}


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    (case,) = (c for c in cases.CASES if c.name == name)
    inputs = case.inputs()
    for key in case.grads:
        inputs[key].requires_grad_()
    torch.library.opcheck(OPCHECKED[name], (*inputs.values(), "torch"))


def test_no_graph_break() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(9, 9))
    coef, basis = seeded(1, 2, 8, 3), seeded(3, 9)
    whole = torch.ones(1, 1, 3, 3, dtype=torch.bool)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        idx = ops.lowrank_topk(coef, basis, 4)
        out = ops.sparse_attention(q, k, v, idx, dense_queries=1)
        return (out + ops.sparse_attention(q, k, v, block_mask=whole, block_size=3)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.testing.assert_close(got, want)


def test_flops_are_those_of_the_pairs_that_are_seen() -> None:
    q, k, v = qkv(10, 12)
    seen = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    seen[0, 0, 2, 2] = seen[0, 0, 0, 1] = True  # 2 x 2 and 4 x 5 pairs in each of two heads
    with FlopCounterMode(display=False) as counter:
        ops.sparse_attention(q, k, v, block_mask=seen, block_size=(4, 5))
    assert counter.get_total_flops() == 4 * 2 * (2 * 2 + 4 * 5) * 8
    with FlopCounterMode(display=False) as counter:
        ops.sparse_attention(q, k, v, torch.zeros(1, 2, 10, 3).long())
    assert counter.get_total_flops() == 4 * 2 * 10 * 3 * 8


class Largest(TorchDispatchMode):
    """The largest tensor that anything writes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and not t._is_view():
                self.numel = max(self.numel, t.numel())
        return out


def test_memory_is_linear_in_the_number_of_tokens() -> None:
    seen: dict[str, list[int]] = {"index": [], "blocks": [], "topk": []}
    for n in (2048, 8192):
        q, k, v = qkv(n, n, h=1)
        gen = torch.Generator().manual_seed(0)
        idx = torch.randint(0, n, (1, 1, n, 8), generator=gen)
        eye = torch.eye(n // 64, dtype=torch.bool)[None, None]
        with Largest() as mode:
            out, p = torch_impl.sparse_attention(q, k, v, idx, 0.3)
            torch_impl.sparse_backward(out, p, q, k, v, idx, 0.3)
        seen["index"].append(mode.numel)
        with Largest() as mode:
            out, lse = blocks.block_sparse_attention(q, k, v, eye, 64, 64, 0.3)
            blocks.block_backward(out, out, lse, q, k, v, eye, 64, 64, 0.3)
        seen["blocks"].append(mode.numel)
        with Largest() as mode:
            torch_impl.lowrank_topk(seeded(1, 1, n, 4), seeded(1, 1, 4, n), 8, None, None)
        seen["topk"].append(mode.numel)
    for name, (small, large) in seen.items():
        assert large <= 4 * small + torch_impl.MAX_SCORES, name
        assert large < 8192 * 8192 / 16, name


Q, K, V = qkv(6, 5)
I = torch.zeros(1, 2, 6, 3, dtype=torch.long)  # noqa: E741
M = torch.ones(1, 1, 3, 3, dtype=torch.bool)
BAD = {
    "neither": (lambda: ops.sparse_attention(Q, K, V), ConfigError, "idx or block_mask; got nei"),
    "both": (lambda: ops.sparse_attention(Q, K, V, I, M), ConfigError, "got both"),
    "layout": (lambda: ops.sparse_attention(Q[0], K, V, I), ConfigError, r"\[B, H, N, d\]"),
    "heads": (lambda: ops.sparse_attention(Q[:, :1], K, V, I), ConfigError, "must be"),
    "integers": (lambda: ops.sparse_attention(Q.long(), K, V, I), ConfigError, "floating"),
    "dtypes": (lambda: ops.sparse_attention(Q, K.half(), V, I), ConfigError, "one dtype"),
    "index dtype": (lambda: ops.sparse_attention(Q, K, V, I.float()), ConfigError, "int64 or"),
    "index shape": (
        lambda: ops.sparse_attention(Q, K, V, I, dense_queries=1),
        ConfigError,
        r"\[1, 2, 5, 'K'\]; got \[1, 2, 6, 3\]",
    ),
    "more than there are": (
        lambda: ops.sparse_attention(Q, K, V, I.repeat(1, 1, 1, 2)),
        ConfigError,
        "at most M = 5 keys of a query; got 6",
    ),
    "outside": (lambda: ops.sparse_attention(Q, K, V, I + 5), ConfigError, r"-1\.\.4 .* got 5"),
    "dense": (
        lambda: ops.sparse_attention(Q, K, V, I, dense_queries=7),
        ConfigError,
        r"0\.\.6 \(the queries given\); got 7",
    ),
    "mask shape": (
        lambda: ops.sparse_attention(Q, K, V, block_mask=M, block_size=4),
        ConfigError,
        r"\[1 or 1, 2 or 1, 2, 2\] for blocks of 4 x 4; got \[1, 1, 3, 3\]",
    ),
    "mask dtype": (
        lambda: ops.sparse_attention(Q, K, V, block_mask=M.float(), block_size=2),
        ConfigError,
        "must be bool; got torch.float32",
    ),
    "block size": (
        lambda: ops.sparse_attention(Q, K, V, block_mask=M, block_size=0),
        ConfigError,
        "at least 1; got 0",
    ),
    "triton": (
        lambda: ops.sparse_attention(Q, K, V, I, backend="triton"),
        UnsupportedKernel,
        "needs a CUDA device.*backend='auto'",
    ),
    "k above n": (lambda: ops.lowrank_topk(Q, K.mT, 6), BudgetError, r"0\.\.5 .* got 6"),
    "rank": (lambda: ops.lowrank_topk(Q, K, 1), ConfigError, r"basis must be \[r, N\]"),
    "basis": (lambda: ops.lowrank_topk(Q, K[0], 1), ConfigError, r"basis must be \[r, N\]"),
    "coef": (lambda: ops.lowrank_topk(Q[0], K.mT, 1), ConfigError, r"\[B, H, R, r\]"),
    "topk dtypes": (lambda: ops.lowrank_topk(Q, K.mT.half(), 1), ConfigError, "one dtype"),
    "topk mask": (
        lambda: ops.lowrank_topk(Q, K.mT, 1, mask=torch.ones(1, 5)),
        ConfigError,
        "must be bool",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_is_allowed(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_why_not() -> None:
    assert len(op.why_not(Q.double(), K.double(), V.double())) == 2
    assert any("head dim 300" in r for r in op.why_not(seeded(1, 1, 1, 300), K))
    wide = torch.empty(1, 1, 8, op.MAX_COLUMNS + 1)
    assert any("N = 16385" in r for r in op.why_not_topk(Q, wide, None))
    assert not any("N =" in r or "dim" in r for r in op.why_not_topk(Q, wide[..., :-1], None))


def test_the_bench_checks_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench.run_index([20], [2, 4], 1, "cpu", "wall")
    assert all(row["agree"] for row in rows)
    rows[0]["forward ratio"], rows[1]["forward ratio"] = 2.0, 0.5
    assert bench.overtakes(rows) == ["N = 20: faster than dense up to K = 2 (forward ratio)"]
    (row,) = bench.run_blocks([70], [0.5], 1, "cpu", "wall")
    assert row["agree"]
    (row,) = bench.run_topk([40], 1, "cpu", "wall")
    assert row["agree"]
    monkeypatch.setattr(op, "sparse_attention", lambda q, k, v, *rest: v)
    (row,) = bench.run_index([20], [2], 1, "cpu", "wall")
    assert not row["agree"]
    assert row["forward ms"] == "-"
