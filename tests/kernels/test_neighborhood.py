# SPDX-License-Identifier: Apache-2.0
"""Neighborhood attention: rules, parameters, memory, compile, bad input."""

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
from visprune.kernels.neighborhood_attention import (
    axis,
    bands,
    op,
    reference,
    tiles,
    torch_impl,
    whole_groups,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[Any], ...]:
    """Space, kernel, stride, dilation, causality of one to three axes."""
    rank = draw(st.integers(1, 3))
    top = (40, 13, 6)[rank - 1]
    rows = []
    for _ in range(rank):
        length = draw(st.integers(2, top))
        kernel = draw(st.integers(2, length))
        stride, dilation = draw(st.integers(1, kernel)), draw(st.integers(1, length // kernel))
        rows.append((length, kernel, stride, dilation, draw(st.booleans())))
    return tuple(list(column) for column in zip(*rows, strict=True))


@settings(max_examples=60)
@given(windows(), st.booleans(), st.integers(0, 2), st.sampled_from([1 << 19, 3000, 1]))
def test_any_window_equals_the_dense_reference(
    window: tuple[list[Any], ...], biased: bool, extra: int, held: int
) -> None:
    space, *params = window
    shape = (2, *space, 2, 3)
    leaves = [seeded(*shape, seed=i).double() for i in range(3)]
    rpb = seeded(2, *(2 * k - 1 for k in params[0]), seed=3).double() if biased else None
    more = [seeded(2, extra, 2, 3, seed=4 + i).double() for i in range(2)] if extra else [None] * 2
    tensors = [*leaves, rpb, *more]
    wanted = [t.requires_grad_() for t in tensors if t is not None]
    noise = seeded(*shape, seed=9).double(), seeded(*shape[:-1], seed=10).double()
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "MAX_HELD", held)
        for call in (
            lambda: reference.neighborhood_attention(*tensors, *params, 0.6),
            lambda: op.neighborhood_attention(*tensors, *params, 0.6, True, "torch"),
        ):
            out, lse = call()
            loss = (out * noise[0]).sum() + (lse * noise[1]).sum()
            results.append([out, lse, *torch.autograd.grad(loss, wanted)])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(windows())
def test_the_unfused_pair_equals_the_fused_operator(window: tuple[list[Any], ...]) -> None:
    space, kernel, stride, dilation, causal = window
    q, k, v = (seeded(1, *space, 2, 3, seed=i).double().requires_grad_() for i in range(3))
    rpb = seeded(2, *(2 * n - 1 for n in kernel), seed=3).double().requires_grad_()
    params = (kernel, stride, dilation, causal)
    fused = ops.neighborhood_attention(q, k, v, *params, rpb=rpb)
    scores = ops.na_qk(q, k, *params, rpb=rpb)
    pair = ops.na_av(scores.softmax(-1), v, *params)
    noise, leaves = seeded(*q.shape, seed=5).double(), (q, k, v, rpb)
    grads = [torch.autograd.grad((out * noise).sum(), leaves) for out in (fused, pair)]
    assert isinstance(fused, Tensor)
    for got, want in zip((pair, *grads[1]), (fused, *grads[0]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    dense = reference.na_qk(q, k, rpb, *params, 3**-0.5)
    torch.testing.assert_close(scores, dense, rtol=1e-9, atol=1e-9)


@settings(max_examples=200)
@given(windows())
def test_every_query_has_its_whole_window_and_a_bias_for_each_key(
    window: tuple[list[Any], ...],
) -> None:
    for length, kernel, stride, dilation, causal in zip(*window, strict=True):
        a = axis.Axis(length, kernel, stride, dilation, causal)
        key, bias = reference.axis_offsets(length, kernel, stride, dilation, causal)
        assert bool((bias[key >= 0] >= 0).all())
        assert bool((bias < 2 * kernel - 1).all())
        assert int((key >= 0).sum()) == axis.pairs(length, kernel, stride, dilation, causal)
        if not causal:
            assert bool((key >= 0).all())
            assert bool((key.amin(1) <= torch.arange(length)).all())
        for group, groups, count in a.groups():
            for position in range(group, length, dilation):
                if position % dilation in range(group, group + groups):
                    got = a.window(position // dilation, count)
                    assert got == reference.axis_window(position, *window_of(a))


def window_of(a: axis.Axis) -> tuple[int, int, int, int, bool]:
    return a.length, a.kernel, a.stride, a.dilation, a.causal


@settings(max_examples=60)
@given(windows(), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 2))
def test_bands_of_rows_equal_the_dense_reference(
    window: tuple[list[Any], ...], count: int, biased: bool, lse_grad: bool, extra: int
) -> None:
    space, *params = window
    count, shape = min(count, space[0]), (2, *space, 2, 3)
    leaves = [seeded(*shape, seed=i).double() for i in range(3)]
    rpb = seeded(2, *(2 * k - 1 for k in params[0]), seed=3).double() if biased else None
    more = [seeded(2, extra, 2, 3, seed=4 + i).double() for i in range(2)] if extra else [None] * 2
    tensors = [*leaves, rpb, *more]
    wanted = [t.requires_grad_() for t in leaves]
    noise = seeded(*shape, seed=9).double(), seeded(*shape[:-1], seed=10).double() * lse_grad
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "chosen", lambda *args: count)
        for call in (reference.neighborhood_attention, _banded):
            out, lse = call(*tensors, *params, 0.6)
            loss = (out * noise[0]).sum() + ((lse * noise[1]).sum() if lse_grad else 0)
            results.append([out, lse, *torch.autograd.grad(loss, wanted)])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def _banded(*args: Any) -> tuple[Tensor, Tensor]:
    return op.neighborhood_attention(*args, True, "torch")


# Side, heads, kernel, dilation, images -> bands of a forward, and of one with gradients.
CHOICES = {
    (7, 16, 7, 1, 1): (1, 1),
    (7, 4, 3, 1, 8): (1, 1),
    (10, 8, 7, 1, 1): (1, 1),
    (14, 8, 7, 1, 1): (1, 1),
    (14, 8, 7, 1, 8): (1, 1),
    (14, 8, 13, 1, 1): (1, 1),
    (14, 8, 3, 1, 1): (0, 1),
    (14, 8, 7, 2, 1): (0, 0),
    (20, 8, 7, 1, 1): (3, 3),
    (20, 8, 3, 1, 1): (0, 0),
    (28, 4, 7, 1, 1): (6, 6),
    (28, 4, 7, 4, 1): (0, 0),
    (28, 4, 13, 2, 1): (0, 0),
    (56, 2, 7, 1, 1): (0, 0),
    (56, 2, 56, 1, 1): (1, 1),  # every query sees every token: no mask, whatever the size
}


@pytest.mark.parametrize(("case", "want"), CHOICES.items(), ids=str)
def test_small_pictures_go_through_fused_attention(
    case: tuple[int, ...], want: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    side, heads, kernel, dilation, images = case
    q = torch.empty(images, side, side, heads, 32)
    window = ([kernel] * 2, [1, 1], [dilation] * 2, [False, False])
    layout = axis.layout(q.shape, *window)
    assert torch_impl.band_count(q, q, layout, False) == want[0]
    assert bands.chosen(layout, images, heads, False, True) == want[1]
    if side <= 28:
        calls = []
        inner = bands.attend
        monkeypatch.setattr(bands, "attend", lambda *a: calls.append(a) or inner(*a))
        leaves = [seeded(*q.shape, seed=i).requires_grad_() for i in range(3)]
        args = (*leaves, None, None, None, *window)
        results = [
            op.attend(*args, 0.2, False, "torch")[0],
            reference.neighborhood_attention(*args, 0.2)[0],
        ]
        apart = whole_groups.covered(layout) is not None  # pictures of their own, one band each
        assert apart == (side == kernel * dilation > kernel)
        assert len(calls) == int(want[1] == 1 or apart)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
        for one, other in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=100)
@given(windows(), st.integers(1, 8), st.integers(1, 16), st.booleans())
def test_masks_of_bands_are_bounded(
    window: tuple[list[Any], ...], images: int, heads: int, biased: bool
) -> None:
    space, *params = window
    layout = axis.layout((images, *space, heads, 8), *params)
    count = bands.chosen(layout, images, heads, biased)
    found = bands.bands(layout, count) if count else ()
    assert sum(b.entries.numel() for b in found) <= bands.MAX_MASK
    queries = [place for b in found for place in range(b.start, b.end)]
    assert queries == list(range(axis.product(space) if count else 0))


def test_a_mask_made_in_inference_mode_serves_under_autograd() -> None:
    q = seeded(1, 9, 9, 4, 8)
    bands.bands.cache_clear()
    with torch.inference_mode():
        want = ops.neighborhood_attention(q, q, q, 5)
    leaf = q.clone().requires_grad_()
    out = ops.neighborhood_attention(leaf, leaf, leaf, 5)
    assert isinstance(out, Tensor)
    assert torch.equal(out, want)
    assert torch.autograd.grad(out.sum(), leaf)[0].abs().sum() > 0


def test_autocast_changes_nothing() -> None:
    q = seeded(1, 7, 7, 2, 8)
    want = ops.neighborhood_attention(q, q, q, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.neighborhood_attention(q, q, q, 7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_kernel_as_wide_as_the_picture_is_plain_attention() -> None:
    q, k, v = (seeded(2, 6, 5, 3, 8, seed=i) for i in range(3))
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2)
    got = ops.neighborhood_attention(q, k, v, (6, 5))
    torch.testing.assert_close(got, want.reshape(q.shape))


def test_stride_as_wide_as_the_kernel_is_window_attention() -> None:
    q, k, v = (seeded(1, 8, 6, 2, 4, seed=i) for i in range(3))

    def cut(t: Tensor) -> Tensor:  # [B, 8, 6, H, D] -> [windows, H, 6, D]
        return t.view(2, 4, 3, 2, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(6, 2, 8, 4)

    flat = [cut(t) for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*flat)
    got = ops.neighborhood_attention(q, k, v, (4, 2), stride=(4, 2))
    torch.testing.assert_close(cut(got), want)


def test_dilation_attends_within_each_interleaved_picture() -> None:
    q, k, v = (seeded(1, 10, 11, 2, 4, seed=i) for i in range(3))
    got = ops.neighborhood_attention(q, k, v, 3, dilation=(2, 3))
    for y in range(2):
        for x in range(3):
            part = [t[:, y::2, x::3] for t in (q, k, v)]
            torch.testing.assert_close(
                got[:, y::2, x::3], ops.neighborhood_attention(*part, kernel_size=3)
            )


def test_additional_keys_are_seen_by_every_query_and_lse_merges() -> None:
    q, k, v = (seeded(2, 7, 6, 2, 8, seed=i) for i in range(3))
    more = [seeded(2, 5, 2, 8, seed=7 + i) for i in range(2)]
    both = ops.neighborhood_attention(
        q, k, v, 3, additional_keys=more[0], additional_values=more[1]
    )
    own, lse = ops.neighborhood_attention(q, k, v, 3, return_lse=True)
    scores = torch.einsum("byxhd,bmhd->byxhm", q, more[0]) * 8**-0.5
    other = torch.einsum("byxhm,bmhd->byxhd", scores.softmax(-1), more[1])
    share = torch.sigmoid(lse - scores.logsumexp(-1))[..., None]
    torch.testing.assert_close(both, own * share + other * (1 - share))


def test_half_inputs_strided_views_and_a_bias_in_fp32() -> None:
    qkv = seeded(2, 9, 8, 3, 2, 24).to(torch.bfloat16)
    q, k, v = qkv.unbind(3)
    rpb = seeded(2, 5, 5).requires_grad_()
    out = ops.neighborhood_attention(q, k, v, 3, rpb=rpb)
    assert isinstance(out, Tensor)
    wide = ops.neighborhood_attention(q.float(), k.float(), v.float(), 3, rpb=rpb)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wide, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(out.sum(), rpb)[0].dtype == torch.float32


class Allocations(TorchDispatchMode):
    """Bytes of all results that are no views, and of the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                size = t.untyped_storage().nbytes()
                self.total, self.largest = self.total + size, max(self.largest, size)
        return out


def test_memory_is_linear_in_the_tokens() -> None:
    measured = []
    for length in (56, 112):
        q = seeded(1, length, length, 2, 32)
        layout = axis.layout(q.shape, [7, 7], [1, 1], [1, 1], [False, False])
        with Allocations() as seen:
            out, lse = torch_impl.forward(q, q, q, None, layout, 0.2, q.dtype, False)
            args = (out, None, q, q, q, None, out, lse, layout, 0.2, False, False)
            torch_impl.backward(*args)
        measured.append((seen.total, seen.largest))
        # A map of scores would hold 2 * N * N numbers.
        assert seen.largest <= max(q.nbytes, 8 * 4 * tiles.MAX_HELD)  # the buffers of a part
    # All bytes ever asked for, so also what is held at one time: 4 times the tokens, 4 times that.
    assert measured[1][0] < 4.5 * measured[0][0]


def test_flops_are_those_of_the_neighbours() -> None:
    q = seeded(2, 9, 8, 2, 4).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = ops.neighborhood_attention(q, q, q, (3, 4), is_causal=(False, True))
    pairs = 2 * 2 * (9 * 3) * (1 + 2 + 3 + 4 * 5)
    assert counter.get_total_flops() == 4 * pairs * 4
    assert isinstance(out, Tensor)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * pairs * 4
    k, v = seeded(1, 3, 2, 4), seeded(1, 3, 2, 4)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        x = torch.empty(1, 8, 8, 2, 4)
        ops.neighborhood_attention(
            x, x, x, 3, additional_keys=k.to("meta"), additional_values=v.to("meta")
        )
    assert counter.get_total_flops() == 4 * 2 * 64 * (9 + 3) * 4


def test_no_graph_break() -> None:
    q, k, v = (seeded(1, 6, 7, 2, 4, seed=i).requires_grad_() for i in range(3))
    rpb = seeded(2, 5, 5, seed=4).requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        out, lse = ops.neighborhood_attention(q, k, v, 3, dilation=2, rpb=rpb, return_lse=True)
        pair = ops.na_av(ops.na_qk(q, k, 3, rpb=rpb).softmax(-1), v, 3)
        return out * lse[..., None] + pair

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = (q, k, v, rpb)
    results = [f(*leaves) for f in (compiled, call)]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
    for got, want in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        torch.testing.assert_close(got, want)


def test_opcheck() -> None:
    q, k, v = (seeded(1, 5, 6, 2, 4, seed=i).requires_grad_() for i in range(3))
    rpb = seeded(2, 5, 7).requires_grad_()
    more = [seeded(1, 2, 2, 4, seed=5 + i).requires_grad_() for i in range(2)]
    window = ([3, 4], [1, 2], [1, 1], [False, True])
    torch.library.opcheck(
        op.neighborhood_attention, (q, k, v, rpb, *more, *window, 0.5, False, "torch")
    )
    torch.library.opcheck(op.na_qk, (q, k, rpb, *window, 0.5, "torch"))
    weights = seeded(1, 5, 6, 2, 12).requires_grad_()
    torch.library.opcheck(op.na_av, (weights, v, *window, "torch"))


X, Y, INT = seeded(1, 6, 7, 2, 4), seeded(1, 6, 7, 3, 4), torch.zeros(1, 6, 7, 2, 4).long()
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "layout": (
        lambda: ops.neighborhood_attention(X[0, 0], X, X, 3),
        ConfigError,
        r"\[B, \*space, H, D\] with one to three axes.*got shape \[7, 2, 4\]",
    ),
    "heads": (
        lambda: ops.neighborhood_attention(X, Y, Y, 3),
        ConfigError,
        r"k must have shape \[1, 6, 7, 2, 4\]; got \[1, 6, 7, 3, 4\]",
    ),
    "values": (lambda: ops.neighborhood_attention(X, X, Y, 3), ConfigError, "v must have shape"),
    "integer": (lambda: ops.neighborhood_attention(INT, INT, INT, 3), ConfigError, "q.*int64"),
    "dtypes": (
        lambda: ops.neighborhood_attention(X, X.half(), X, 3), ConfigError, "one dtype.*float16",
    ),
    "devices": (
        lambda: ops.neighborhood_attention(X, X.to("meta"), X, 3),
        ConfigError,
        "on one device; got q on cpu, k on meta",
    ),
    "kernel too large": (
        lambda: ops.neighborhood_attention(X, X, X, 7),
        ConfigError,
        "kernel_size must be 2 to 6 on axis 0 of q with 6 tokens; got 7",
    ),
    "kernel one": (lambda: ops.na_qk(X, X, (3, 1)), ConfigError, "2 to 7 on axis 1.*got 1"),
    "kernel float": (lambda: ops.na_qk(X, X, (3, 3.0)), ConfigError, "one int or one for each"),
    "axes": (lambda: ops.na_qk(X, X, (3, 3, 3)), ConfigError, "one for each of 2 axes"),
    "stride": (lambda: ops.na_qk(X, X, 3, stride=4), ConfigError, "1 to kernel_size = 3; got 4"),
    "dilation": (
        lambda: ops.neighborhood_attention(X, X, X, 3, dilation=(1, 3)),
        ConfigError,
        "with 7 tokens: with kernel_size 3, dilation must be 1 to 2; got 3",
    ),
    "causal": (lambda: ops.na_qk(X, X, 3, is_causal=(1, 0)), ConfigError, "one bool"),
    "bias": (
        lambda: ops.neighborhood_attention(X, X, X, 3, rpb=torch.zeros(2, 3, 3)),
        ConfigError,
        r"rpb \(heads, 2 \* kernel_size - 1\) must have shape \[2, 5, 5\]",
    ),
    "half of the additional": (
        lambda: ops.neighborhood_attention(X, X, X, 3, additional_keys=X[:, 0]),
        ConfigError,
        "additional_keys and additional_values, or neither",
    ),
    "additional": (
        lambda: ops.neighborhood_attention(
            X, X, X, 3, additional_keys=Y[:, 0], additional_values=X[:, 0]
        ),
        ConfigError,
        r"additional_keys must have shape \[1, 7, 2, 4\]",
    ),
    "weights": (
        lambda: ops.na_av(torch.zeros(1, 6, 7, 2, 8), X, 3), ConfigError, "attn must have shape",
    ),
    "backend": (lambda: ops.na_qk(X, X, 3, backend="cuda"), ConfigError, "auto, triton, torch"),
    "triton on the cpu": (
        lambda: ops.neighborhood_attention(X, X, X, 3, backend="triton"),
        UnsupportedKernel,
        "on cpu, Triton needs a CUDA device.*backend='auto'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_is_allowed(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_why_not_lists_every_reason() -> None:
    wide = seeded(1, 4, 1, 130).double()
    reasons = op.why_not(wide, wide, wide, None)
    assert len(reasons) == 3
    assert any("head dim 130 is above 128" in r for r in reasons)


def test_what_is_remembered_of_the_checks_lets_nothing_else_through() -> None:
    q = seeded(1, 5, 5, 2, 4)
    want = ops.neighborhood_attention(q, q, q, kernel_size=3, dilation=1)
    assert torch.equal(ops.neighborhood_attention(q, q, q, kernel_size=(3, 3), dilation=1), want)
    for wrong in (3.0, (3, 3.0), torch.tensor(3)):
        with pytest.raises(ConfigError, match="kernel_size must be one int"):
            ops.neighborhood_attention(q, q, q, kernel_size=wrong, dilation=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is_causal"):
        ops.neighborhood_attention(q, q, q, kernel_size=3, dilation=1, is_causal=0)
    for _ in range(2):  # a refusal is not remembered as an answer
        with pytest.raises(ConfigError, match="2 to 2 on axis 0"):
            ops.neighborhood_attention(q[:, :2], q[:, :2], q[:, :2], kernel_size=3)
