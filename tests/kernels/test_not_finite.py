# SPDX-License-Identifier: Apache-2.0
"""A token that is not finite reaches the queries whose window holds it, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from visprune import ops
from visprune.kernels.neighborhood_attention import bands, gathered, op, reference

# length of both axes, kernel, stride, dilation, causal: one band, several, tiles
WINDOWS = {
    "one band": (14, 7, 1, 1, False),
    "small window": (20, 3, 1, 1, False),
    "tiles": (28, 7, 1, 1, False),
    "large": (40, 3, 1, 1, False),
    "dilated": (16, 3, 1, 5, False),
    "strided": (15, 4, 3, 1, False),
    "causal": (13, 3, 1, 2, True),
}
BROKEN = {"nan": torch.nan, "inf": torch.inf, "minus inf": -torch.inf}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def window(name: str) -> tuple[int, dict[str, Any]]:
    side, *values = WINDOWS[name]
    names = ("kernel_size", "stride", "dilation", "is_causal")
    return side, dict(zip(names, values, strict=True))


def reached(name: str, at: int) -> tuple[Tensor, Tensor]:
    """Queries [N] that see token ``at``, and keys [N] that one of these queries sees."""
    side, values = window(name)
    key, _, there = reference.tables((side, side), *([v, v] for v in values.values()))
    queries = ((key == at) & there).any(1)
    keys = torch.zeros(side * side, dtype=torch.bool)
    keys[key[queries][there[queries]]] = True
    return queries, keys


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("place", ["k", "v"])
def test_it_stays_in_its_window(name: str, broken: str, train: bool, place: str) -> None:
    side, values = window(name)
    at = side * side // 2 + side // 2
    q, k, v = (seeded(1, side, side, 2, 8, seed=i) for i in range(3))
    clean = ops.neighborhood_attention(q, k, v, **values)
    {"k": k, "v": v}[place].view(-1, 2, 8)[at] = BROKEN[broken]
    queries, keys = reached(name, at)
    leaves = [t.requires_grad_(train) for t in (q, k, v)]
    out = ops.neighborhood_attention(q, k, v, **values)
    assert isinstance(out, Tensor)
    assert isinstance(clean, Tensor)
    got, want = out.detach().flatten(1, 2)[0], clean.flatten(1, 2)[0]
    torch.testing.assert_close(got[~queries], want[~queries])
    if broken == "nan":
        assert bool(got[queries].isnan().all())
    if train:
        free = out.flatten(1, 2)[:, ~queries].square().sum()
        grads = [g.flatten(1, 2)[0] for g in torch.autograd.grad(free, leaves)]
        assert bool(grads[0][~queries].isfinite().all())
        assert all(bool(g[~keys].isfinite().all()) for g in grads[1:])


@pytest.mark.parametrize("name", WINDOWS)
def test_it_stays_in_its_window_unfused(name: str) -> None:
    side, values = window(name)
    at = side + 1
    q, k, v = (seeded(1, side, side, 2, 8, seed=i) for i in range(3))
    weights = ops.na_qk(q, k, **values).softmax(-1)
    v.view(-1, 2, 8)[at] = torch.nan
    queries, _ = reached(name, at)
    weights.requires_grad_()
    v.requires_grad_()
    out = ops.na_av(weights, v, **values).flatten(1, 2)
    assert torch.equal(out.isnan().all(-1).all(-1)[0], queries)
    assert torch.equal(out.isnan().any(-1).any(-1)[0], queries)
    grad = torch.autograd.grad(out.nan_to_num().sum(), v)[0]
    assert bool(grad.isfinite().all())
    noise = torch.zeros_like(out)
    noise[:, at] = torch.nan  # spread: one query's gradient to its own keys
    (grad,) = torch.autograd.grad(ops.na_av(weights, v, **values).flatten(1, 2), v, noise)
    key, _, there = reference.tables((side, side), *([n, n] for n in values.values()))
    own = torch.zeros(side * side, dtype=torch.bool)
    own[key[at][there[at]]] = True
    assert torch.equal(grad.flatten(1, 2)[0].isnan().any(-1).any(-1), own)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("extra", [0, 2])
def test_the_way_of_what_is_broken_is_the_same_attention(
    name: str, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, values = window(name)
    params = [[value, value] for value in values.values()]
    leaves = [seeded(2, side, side, 2, 4, seed=i).double() for i in range(3)]
    leaves.append(seeded(2, *[2 * params[0][0] - 1] * 2, seed=4).double())
    leaves += [seeded(2, extra, 2, 4, seed=5 + i).double() for i in range(2)] if extra else []
    tensors = [*leaves, *[None] * (6 - len(leaves))]
    wanted = [t.requires_grad_() for t in leaves]
    noise = seeded(2, side, side, 2, 4, seed=9).double(), seeded(2, side, side, 2, seed=10).double()
    results = []
    for spoiled in (False, True):
        monkeypatch.setattr(gathered, "spoiled", lambda *_, spoiled=spoiled: spoiled)
        monkeypatch.setattr(gathered, "MAX_GATHERED", 5000)
        out, lse = op.neighborhood_attention(*tensors, *params, 0.6, True, "torch")
        loss = (out * noise[0]).sum() + (lse * noise[1]).sum()
        results.append([out, lse, *torch.autograd.grad(loss, wanted)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_nobody_looks_where_all_see_all() -> None:
    q = seeded(1, 7, 7, 2, 8)
    assert bands.alone(q.shape, (7, 7), (1, 1), (1, 1), (False, False), False) is not None
    q[0, 3, 3] = torch.nan
    out = ops.neighborhood_attention(q, q, q, 7)
    assert isinstance(out, Tensor)
    assert bool(out.isnan().all())


def test_large_numbers_are_finite() -> None:
    """A sum that overflows is no reason to take the slow way."""
    assert not gathered.spoiled(op.axis.layout((1, 9, 1, 1), [3], [1], [1], [0]),
                                torch.full((64,), 3e38))  # fmt: skip


def test_functions_may_be_mapped() -> None:
    q = seeded(3, 1, 14, 14, 2, 8)

    def call(x: Tensor) -> Any:
        return ops.neighborhood_attention(x, x, x, 7)

    torch.testing.assert_close(torch.func.vmap(call)(q), torch.stack([call(x) for x in q]))
