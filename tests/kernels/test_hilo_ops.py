# SPDX-License-Identifier: Apache-2.0
"""HiLo attention: meaning of its two branches, padding, compile, memory, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from visprune import ops
from visprune.errors import ConfigError, UnsupportedKernel
from visprune.kernels.hilo_attention import bench, cases, op, reference, torch_impl


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branch(space: tuple[int, ...], heads: int, keys: tuple[int, ...], dim: int = 8) -> list[Tensor]:
    return [seeded(*s, heads, dim, seed=i) for i, s in enumerate((space, keys, keys))]


@given(
    height=st.integers(1, 11), width=st.integers(1, 11), ws=st.integers(1, 5),
    heads=st.sampled_from([(1, 0), (0, 2), (2, 1)]), masked=st.booleans(), pads=st.booleans(),
    grid=st.sampled_from([None, (1, 1), (3, 2)]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30)
def test_any_size_window_and_padding(
    height: int, width: int, ws: int, heads: tuple[int, int], masked: bool, pads: bool,
    grid: tuple[int, int] | None, seed: int,
) -> None:  # fmt: skip
    rows, cols = grid or (-(-height // ws), -(-width // ws))
    shape = (2, height, width, heads[0], 8)
    high = [seeded(*shape, seed=seed + i) if heads[0] else None for i in range(3)]
    pad = [seeded(heads[0], 8, seed=9 + i) if heads[0] and pads else None for i in range(2)]
    low_shapes = [(2, height, width), (2, rows, cols), (2, rows, cols)]
    low = [seeded(*s, heads[1], 8) if heads[1] else None for s in low_shapes]
    got = ops.hilo_attention(*high, *low, window_size=ws, masked=masked, pad_k=pad[0], pad_v=pad[1])
    want = reference.hilo_attention(*high, *low, *pad, ws, 8**-0.5, masked)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_high_heads_see_their_window_and_low_heads_see_everything() -> None:
    q, k, v = branch((1, 4, 6), 1, (1, 4, 6))
    low = branch((1, 4, 6), 1, (1, 2, 3))
    base = ops.hilo_attention(q, k, v, *low)
    other = v.clone()
    other[0, 1, 3] += 1  # the window of rows 0 to 1, columns 2 to 3
    moved = (ops.hilo_attention(q, k, other, *low) != base).any(-1)[0]
    want = torch.zeros(4, 6, 2, dtype=torch.bool)
    want[:2, 2:4, 0] = True
    assert torch.equal(moved, want)
    low[2] = low[2] + torch.nn.functional.one_hot(torch.tensor(4), 6).view(1, 2, 3, 1, 1)
    assert (ops.hilo_attention(q, k, v, *low) != base).any(-1)[0, ..., 1].all()


def test_masked_padding_equals_windows_cut_at_the_border() -> None:
    q, k, v = branch((2, 5, 7), 2, (2, 5, 7))
    got = ops.hilo_attention(q, k, v, None, None, None, window_size=3, masked=True)
    for y in (0, 3):
        for x in (0, 3, 6):
            tile = [t[:, y : y + 3, x : x + 3] for t in (q, k, v)]
            alone = reference.attend(*[t.flatten(1, 2) for t in tile], 8**-0.5)
            part = got[:, y : y + 3, x : x + 3]
            torch.testing.assert_close(part, alone.view_as(part), rtol=1e-5, atol=1e-6)
    pads = [seeded(2, 8, seed=5).requires_grad_() for _ in range(2)]
    same = ops.hilo_attention(
        q, k, v, None, None, None, 3, masked=True, pad_k=pads[0], pad_v=pads[1]
    )
    assert torch.equal(same, got)  # what nobody sees changes nothing, and has no gradient
    assert all(not g.any() for g in torch.autograd.grad(same.sum(), pads))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 6, 4), (2, 7, 5), (1, 1, 3), (0, 4, 4), (1, 0, 5)])
def test_pooling(size: tuple[int, int, int], masked: bool) -> None:
    x = seeded(*size, 6)
    for ws in (1, 2, 4):
        got, want = ops.hilo_pool(x, ws, masked), reference.pool(x, ws, masked)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_layer_equals_the_official_structure_and_one_padded_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = bench.Baseline(32, 4, 2, 0.5), seeded(2, 6, 4, 32)
    torch.testing.assert_close(bench.ours(layer, x, "torch"), layer(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # another way to the same numbers: written into place
        torch.testing.assert_close(bench.ours(layer, x, "torch"), layer(x), rtol=1e-4, atol=1e-5)
    cut, whole = x[:, :5, :3], torch.zeros(2, 6, 4, 32)
    whole[:, :5, :3] = cut
    want = layer(whole)[:, :5, :3]
    torch.testing.assert_close(bench.ours(layer, cut, "torch"), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(6, 4), (5, 3)])
def test_a_small_layer_is_trained_without_the_operator(
    size: tuple[int, int], alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = bench.Baseline(32, 4, 2, alpha), seeded(2, *size, 32).requires_grad_()
    leaves = [x, *layer.parameters()]
    calls, operator = [], op.hilo_forward
    monkeypatch.setattr(op, "hilo_forward", lambda *a: calls.append(a) or operator(*a))
    outs, grads = [], []
    for most in (op.MAX_PLAIN, 0):
        monkeypatch.setattr(op, "MAX_PLAIN", most)
        outs.append(bench.ours(layer, x, "torch"))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), leaves))
        assert len(calls) == (most == 0)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    for plain, own in zip(*grads, strict=True):
        torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    with FlopCounterMode(display=False) as counter:  # who counts still meets the operator
        bench.ours(layer, x, "torch")
    assert torch.ops.visprune.hilo_attention in counter.get_flop_counts()["Global"]


def test_the_layer_has_a_shape_on_meta() -> None:
    layer = bench.Baseline(32, 4, 2, 0.5).to("meta")
    x = torch.empty(2, 5, 3, 32, device="meta")
    with torch.no_grad():
        assert bench.ours(layer, x, "torch").shape == x.shape


@pytest.mark.parametrize(
    "name", ["hilo", "hilo_window_4_padded", "hilo_many_keys", "hilo_low_only"]
)
def test_opcheck(name: str) -> None:
    (case,) = (c for c in cases.CASES if c.name == name)
    inputs = case.inputs()
    for key in case.grads:
        if inputs[key] is not None:
            inputs[key].requires_grad_()
    torch.library.opcheck(op.hilo_forward, (*inputs.values(), True, "torch"))


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_no_graph_break(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = bench.Baseline(16, 4, 2, 0.5), seeded(1, *size, 16).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return bench.ours(layer, x, "torch").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    got, want = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss))
    torch.testing.assert_close(got, want)


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
    """Inputs and outputs are linear; the scores in between never reach tokens x keys."""
    seen = {}
    for side in (32, 64):
        tokens = side * side
        high = branch((1, side, side), 1, (1, side, side))
        low = branch((1, side, side), 1, (1, side // 2, side // 2))
        inputs = (*high, *low, None, None, 2, 0.3, False)
        with Largest() as mode:
            out, lse = torch_impl.hilo_attention(*inputs)
            torch_impl.high_backward(out[:, :, :, :1], *high, None, None, 2, 0.3, False)
            torch_impl.low_backward(out[:, :, :, 1:], out[:, :, :, 1:], lse, *low, 0.3)
        seen[tokens] = mode.numel
    assert seen[4096] <= 4 * seen[1024]
    assert seen[4096] < 4096 * 1024 / 16


def test_small_layers_keep_probabilities_where_gradients_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same gradients, from what was kept or computed again; without gradients none is kept."""
    tensors = (*branch((2, 7, 5), 2, (2, 7, 5)), *branch((2, 7, 5), 1, (2, 3, 3)))
    leaves = [t.requires_grad_() for t in tensors]
    rest = (None, None, 4, 0.3, False)
    known = op.hilo_forward(*tensors, *rest, True, "torch")[1]
    assert len(known) == 2 * 2 * 2 * 2 * 4**4 + 2 * 35 * 9  # windows, and every pixel to 9 keys
    assert not op.hilo_forward(*tensors, *rest, False, "torch")[1].numel()
    seen, plain = [], torch_impl.hilo_attention

    def noted(*args: Any) -> tuple[Tensor, Tensor]:
        found = plain(*args)
        seen.append(found[1].numel())
        return found

    monkeypatch.setattr(torch_impl, "hilo_attention", noted)
    got = {}
    for most in (len(known), len(known) - 1):
        monkeypatch.setattr(torch_impl, "MAX_KEPT", most)
        out = ops.hilo_attention(*tensors, window_size=4, scale=0.3)
        got[most] = torch.autograd.grad(out.square().sum(), leaves)
    with torch.no_grad():
        ops.hilo_attention(*tensors, window_size=4, scale=0.3)
    assert seen == [len(known), 0, 0]
    for one, other in zip(*got.values(), strict=True):
        assert torch.equal(one, other)


Q = seeded(1, 4, 4, 2, 8)
K = seeded(1, 2, 2, 2, 8)
W = (seeded(48, 16), None)


def layer_call(**changed: Any) -> Callable[[], Tensor]:
    given = {"h_qkv": W, "h_proj": (seeded(16, 16), None), **changed}
    return lambda: ops.hilo_layer(seeded(1, 4, 4, 16), 8, **given)


BAD = {
    "nothing": (lambda: ops.hilo_attention(*[None] * 6), "q, k, v or low_q.* got none"),
    "half a branch": (lambda: ops.hilo_attention(Q, Q, *[None] * 4), "all of q, k and v"),
    "layout": (lambda: ops.hilo_attention(Q[0], Q, Q, *[None] * 3), r"\[B, H, W, heads, d\]"),
    "shapes": (lambda: ops.hilo_attention(Q, K, K, *[None] * 3), "one shape; got"),
    "heads": (lambda: ops.hilo_attention(*[None] * 3, Q, K[..., :1, :], K), "B, heads and d"),
    "grids": (lambda: ops.hilo_attention(Q, Q, Q, Q[:, :2], K, K), "agree in B, H, W and d"),
    "integers": (lambda: ops.hilo_attention(Q.long(), Q, Q, *[None] * 3), "q must be a floating"),
    "dtypes": (lambda: ops.hilo_attention(Q, Q, Q, Q.half(), K.half(), K.half()), "one dtype"),
    "window": (lambda: ops.hilo_attention(Q, Q, Q, Q, K, K, 0), "at least 1; got 0"),
    "no low keys": (lambda: ops.hilo_attention(*[None] * 3, Q, K[:, :0], K[:, :0]), "one key"),
    "pad": (
        lambda: ops.hilo_attention(Q, Q, Q, *[None] * 3, pad_k=seeded(8)),
        r"pad_k must have shape \[2, 8\]; got \[8\]",
    ),
    "pad without heads": (
        lambda: ops.hilo_attention(*[None] * 3, Q, K, K, pad_v=seeded(2, 8)),
        "pad_v belongs to the high heads",
    ),
    "pool": (lambda: ops.hilo_pool(Q, 2), r"\[B, H, W, C\]"),
    "layer": (layer_call(h_proj=None), "belong together"),
    "layer low": (layer_call(l_q=W), "belong together"),
    "layer rows": (layer_call(h_qkv=(seeded(40, 16), None)), "multiple of 24 rows; got 40"),
    "layer keys": (layer_call(l_q=W, l_kv=W, l_proj=W), "twice as many; got 48 and 48"),
    "layer none": (layer_call(h_qkv=None, h_proj=None), "at least one branch"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_is_allowed(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_why_not() -> None:
    with pytest.raises(UnsupportedKernel, match=r"needs a CUDA device.*backend='auto'"):
        ops.hilo_attention(Q, Q, Q, Q, K, K, backend="triton")
    reasons = op.why_not(9, seeded(1, 9, 9, 1, 300).double())
    assert all(any(word in r for r in reasons) for word in ("float64", "300", "window_size 9"))
    assert not any("window_size" in r for r in op.why_not(9, None, Q))  # no windows, no limit


def test_the_bench_checks_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (("small", 4, 16, 4, 2, 0.5, 1),)
    (row,) = bench.run(1, 1, shape)
    assert row["agree"]
    assert float(str(row["/ official"])) > 0
    monkeypatch.setattr(bench, "ours", lambda layer, x, backend: layer(x) + 1)
    (row,) = bench.run(1, 1, shape)
    assert not row["agree"]
    assert row["ms"] == "-"
