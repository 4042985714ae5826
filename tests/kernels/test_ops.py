# SPDX-License-Identifier: Apache-2.0
"""The public operators: rules on tiny inputs, ties, paths, compile, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from visprune import ops
from visprune.errors import BudgetError, ConfigError, UnsupportedKernel
from visprune.kernels.attention_rows import op as rows_op
from visprune.kernels.greedy_diverse import op as greedy_op
from visprune.kernels.greedy_diverse import pruned, reference, torch_impl


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_greedy(x: list[list[float]], k: int, objective: str, pivot: int) -> list[int]:
    """Plain Python floats (fp64): no tensor operation shared with the code under test."""

    def cos(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    kept = [pivot]
    while len(kept) < k:
        fold: Callable[[list[float]], float] = max if objective == "k_center" else sum
        rest = [v for v in range(len(x)) if v not in kept]
        kept.append(min(rest, key=lambda v: (fold([cos(x[v], x[c]) for c in kept]), v)))
    return kept


@pytest.mark.parametrize("objective", ["k_center", "max_sum"])
def test_greedy_reference_equals_a_plain_loop(objective: str) -> None:
    x = seeded(14, 5)
    want = loop_greedy(x.tolist(), 9, objective, 3)
    assert reference.greedy_one(x.double(), 9, objective, 3, "given").tolist() == want


def test_dpp_reference_maximises_the_determinant_at_every_step() -> None:
    x, r = seeded(12, 8).double(), torch.rand(12, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(x, dim=-1)
    kernel = r[:, None] * (unit @ unit.T) * r
    kept: list[int] = []
    for _ in range(6):
        rest = [v for v in range(12) if v not in kept]
        kept.append(max(rest, key=lambda v: float(torch.det(kernel[[*kept, v]][:, [*kept, v]]))))
    assert reference.greedy_one(x, 6, "dpp", None, "relevance", r.double()).tolist() == kept


def test_attention_rows_equal_a_plain_loop() -> None:
    q, k = seeded(1, 2, 3, 4).double(), seeded(1, 1, 5, 4, seed=1).double()
    got = ops.attention_rows(q, k, causal=True)
    for h in range(2):
        for r in range(3):
            seen = 3 + r  # the rows are the last three of five positions
            z = [sum((q[0, h, r] * k[0, 0, j]).tolist()) / 2 for j in range(seen)]
            total = sum(math.exp(v) for v in z)
            want = [math.exp(v) / total for v in z] + [0.0] * (5 - seen)
            assert got[0, h, r].tolist() == pytest.approx(want, abs=1e-12)
    sums = ops.column_sums(q, k, causal=True, reduce="none", block=2)
    torch.testing.assert_close(sums, got.sum(2))


# One-hot rows and their negatives have exact cosines on any path, so ties are ties.
@pytest.mark.parametrize("backend_path", ["gram", "pruned", "batched"])
@pytest.mark.parametrize("objective", ["k_center", "max_sum", "dpp"])
def test_ties_keep_the_lower_index(backend_path: str, objective: str) -> None:
    x = torch.eye(8)[[0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 7]] * 4
    want = [1, 2, 3, 5, 6, 7, 8, 9, 0] if objective != "dpp" else [1, 2, 3, 5, 6, 7, 8, 9]
    k, start = len(want), 1
    inv = pruned.inverse_norms(x)
    if backend_path == "gram":
        got = torch_impl.select_one(x, k, objective, "given", start, None)
    elif backend_path == "batched":
        pick = torch.tensor([start, start])
        both = torch.stack([x, x])
        got = torch_impl.gram_path(both, k, objective, "given", pick, None, None)[1]
    elif objective == "dpp":
        got = pruned.dpp(x, inv, k, start, torch.ones(11))
    else:
        got = getattr(pruned, objective)(x, inv, k, start)
    assert got.tolist() == want


def test_ties_of_the_first_pick_keep_the_lower_index() -> None:
    x = torch.eye(6)[[0, 0, 1, 2, 3, 4]]
    assert pruned.isolated_token(x, pruned.inverse_norms(x), block=2) == 2
    assert ops.greedy_diverse(x, 1, pivot="farthest_neighbor").tolist() == [2]
    assert ops.greedy_diverse(x, 1).tolist() == [2]
    assert ops.greedy_diverse(x, 1, objective="dpp").tolist() == [0]


@given(
    n=st.integers(1, 90), k=st.integers(1, 40), dim=st.integers(8, 40), seed=st.integers(0, 999),
    kind=st.sampled_from(["normal", "near", "copies"]),
)  # fmt: skip
def test_the_pruned_paths_give_the_same_order(
    n: int, k: int, dim: int, seed: int, kind: str
) -> None:
    k, x = min(k, n), seeded(n, dim, seed=seed)
    if kind != "normal":
        x = x[torch.arange(n) // 3]
    if kind == "near":
        x = x + 0.05 * seeded(n, dim, seed=seed + 1)
    x = (x * 8).round()  # integers: products are exact, so paths differ by one rounding alone
    x[x.abs().sum(1) == 0, 0] = 1
    if kind == "copies":  # equal rows tie exactly only where every product is exact
        x = torch.eye(n, 96)[torch.arange(n) // 3]
    inv = pruned.inverse_norms(x)
    first = pruned.isolated_token(x, inv, block=7)
    for objective in ("k_center", "max_sum"):
        want = reference.greedy_one(x.double(), k, objective, None, "farthest_neighbor")
        got = getattr(pruned, objective)(x, inv, k, first)
        assert_same_up_to_rounding(x, got, want, objective)


def assert_same_up_to_rounding(x: Tensor, got: Tensor, want: Tensor, objective: str) -> None:
    """Equal, or the first difference is between tokens whose fp64 scores differ by < 1e-5."""
    if torch.equal(got, want):
        return
    step = int((got != want).nonzero()[0, 0])
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    cos = unit @ unit.T
    if step == 0:
        near = cos.fill_diagonal_(-2).amax(1)
        assert abs(float(near[got[0]] - near[want[0]])) < 1e-5
        return
    kept = cos[:, want[:step]]
    score = kept.amax(1) if objective == "k_center" else kept.sum(1)
    assert abs(float(score[got[step]] - score[want[step]])) < 1e-5


def test_equal_tokens_are_never_picked_twice() -> None:
    x = torch.ones(2, 9, 4)
    for objective in ("k_center", "max_sum", "dpp"):
        got = ops.greedy_diverse(x, 9, objective=objective)
        assert got.sort().values.tolist() == [list(range(9))] * 2


def test_a_row_with_few_candidates_is_padded() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    got = ops.greedy_diverse(seeded(2, 4, 8), torch.tensor([3, 4]), mask=mask)
    assert got.shape == (2, 4)
    assert sorted(got[0, :2].tolist()) == [0, 2]
    assert got[0, 2:].tolist() == [-1, -1]
    assert sorted(got[1].tolist()) == [0, 1, 2, 3]


def test_large_counts_take_the_path_without_a_gram_matrix(monkeypatch: Any) -> None:
    def refuse(xn: Tensor) -> Tensor:
        raise AssertionError("a Gram matrix was made")

    monkeypatch.setattr(torch_impl, "gram_triangle", refuse)
    monkeypatch.setattr(torch_impl, "MAX_GRAM", 200)
    x, rel = seeded(301, 24), torch.rand(301, generator=torch.Generator().manual_seed(2))
    for objective in ("k_center", "max_sum", "dpp"):
        r = rel if objective == "dpp" else None
        got = ops.greedy_diverse(x, 20, objective=objective, pivot=7, relevance=r)
        want = reference.greedy_one(x.double(), 20, objective, 7, "given", r)
        assert torch.equal(got, want)


def test_merge_mean_and_unmerge() -> None:
    x, size = seeded(2, 6, 3), torch.tensor([[1.0, 2, 1, 1, 3, 1]]).repeat(2, 1)
    dest = torch.tensor([[0, 0, 1, -1, 1, 2], [2, 2, 2, 2, -1, -1]])
    got = ops.merge_tokens(x, dest, 3, weight=size, mean=True)
    want = (x[0, 0] + 2 * x[0, 1]) / 3
    torch.testing.assert_close(got[0, 0], want)
    assert got[1, :2].eq(0).all()  # slots without tokens
    back = ops.unmerge_tokens(got, dest)
    assert torch.equal(back[0, 1], got[0, 0])
    assert back[0, 3].eq(0).all()


def test_second_derivatives_of_a_reduction() -> None:
    x, w = seeded(1, 4, 2).double().requires_grad_(), torch.rand(1, 4).double().requires_grad_()
    slot = torch.tensor([[0, 1, 0, -1]])
    assert torch.autograd.gradgradcheck(
        lambda a, b: ops.reduce_tokens(a, 2, slot=slot, weight=b), (x, w)
    )


def _compiled(f: Callable[..., Tensor], *args: Any) -> None:
    torch._dynamo.reset()
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(got, f(*args))


def test_no_graph_break() -> None:
    x, q, k = seeded(2, 12, 8), seeded(2, 4, 3, 8), seeded(2, 2, 12, 8, seed=2)
    pivot = torch.tensor([1, 2])
    _compiled(lambda x, p: ops.greedy_diverse(x, 5, pivot=p), x, pivot)
    _compiled(lambda q, k: ops.attention_rows(q, k, reduce="mean", causal=True), q, k)
    _compiled(lambda q, k: ops.column_sums(q, k), q.requires_grad_(), k)

    def tome(x: Tensor) -> Tensor:
        dest, slots = ops.bipartite_match(x, 3, class_token=True)
        return ops.unmerge_tokens(ops.merge_tokens(x, dest, slots, mean=True), dest)

    _compiled(tome, x)


X, Q, K = seeded(2, 6, 4), seeded(1, 4, 2, 8), seeded(1, 2, 6, 8)
BAD = {
    "keep above N": (lambda: ops.greedy_diverse(X, 7), BudgetError, r"0\.\.6 .* got 7"),
    "keep below 0": (lambda: ops.greedy_diverse(X, -1), BudgetError, "got -1"),
    "keep per row": (lambda: ops.greedy_diverse(X, torch.tensor([1])), BudgetError, r"\[2\]"),
    "objective": (lambda: ops.greedy_diverse(X, 2, "max_min"), ConfigError, "k_center, max_sum"),
    "integer": (lambda: ops.greedy_diverse(X.long(), 2), ConfigError, "floating.*int64"),
    "part of a token": (
        lambda: ops.greedy_diverse(X, 2.5),
        BudgetError,
        r"num_keep must be an int.*got 2\.5",
    ),
    "shape": (lambda: ops.greedy_diverse(X[0, 0], 1), ConfigError, r"\[N, D\] or \[B, N, D\]"),
    "pivot": (lambda: ops.greedy_diverse(X, 2, pivot=6), ConfigError, r"0\.\.5; got \[6, 6\]"),
    "pivot name": (lambda: ops.greedy_diverse(X, 2, pivot="cls"), ConfigError, "farthest"),
    "pivot masked": (
        lambda: ops.greedy_diverse(X, 2, pivot=0, mask=torch.arange(12).view(2, 6) % 2 > 0),
        ConfigError,
        "masked out",
    ),
    "relevance": (
        lambda: ops.greedy_diverse(X, 2, relevance=torch.ones(2, 6)),
        ConfigError,
        "objective='dpp' only",
    ),
    "mask": (lambda: ops.greedy_diverse(X, 2, mask=torch.ones(2, 5)), ConfigError, r"\[2, 6\]"),
    "backend": (lambda: ops.greedy_diverse(X, 2, backend="cuda"), ConfigError, "auto, triton"),
    "triton": (
        lambda: ops.greedy_diverse(X, 2, backend="triton"),
        UnsupportedKernel,
        "needs a CUDA device.*backend='auto'",
    ),
    "triton fp64": (
        lambda: ops.attention_rows(Q.double(), K.double(), backend="triton"),
        UnsupportedKernel,
        "torch.float64",
    ),
    "heads": (lambda: ops.attention_rows(Q[:, :3], K), ConfigError, "multiple.* got 3 and 2"),
    "dtypes": (lambda: ops.attention_rows(Q, K.half()), ConfigError, "one dtype.*float16"),
    "layout": (lambda: ops.attention_rows(Q[0], K), ConfigError, r"\[B, H, R, d\]"),
    "reduce": (lambda: ops.column_sums(Q, K, reduce="max"), ConfigError, "none, mean, sum"),
    "mask rank": (
        lambda: ops.attention_rows(Q, K, mask=torch.ones(1, 6)),
        ConfigError,
        r"mask\[:, None, None\]",
    ),
    "positions": (
        lambda: ops.attention_rows(Q, K, query_idx=torch.arange(3), causal=True),
        ConfigError,
        r"\[2\] or \[1, 2\]",
    ),
    "no entries": (lambda: ops.reduce_tokens(X, 2), ConfigError, "source or slot"),
    "slots": (
        lambda: ops.reduce_tokens(X, 2, source=torch.zeros(2, 3).long()),
        ConfigError,
        "num_slots must be 3; got 2",
    ),
    "r": (lambda: ops.bipartite_match(X, -1), BudgetError, "at least 0; got -1"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_is_allowed(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_why_not_lists_every_reason() -> None:
    assert len(greedy_op.why_not(X.double())) == 2
    assert any("head dim 300" in r for r in rows_op.why_not(seeded(1, 1, 1, 300), K))
