# SPDX-License-Identifier: Apache-2.0
"""Custom ops ``visprune::hilo_attention`` and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from visprune.kernels.common import requirements
from visprune.kernels.common.autograd import differentiable, gradients_of, watched
from visprune.kernels.common.precision import uncast, wide_or_other

from . import dense, torch_impl

MAX_HEAD_DIM = 256
Linear = tuple[Tensor, Tensor | None]  # weight [out, in] and bias
MAX_PLAIN = 1 << 18  # probabilities of a layer: up to here it is trained without the operator
MAX_WINDOW = 8  # 64 tokens: a window is one tile of the kernel


def why_not(window_size: int, *tensors: Tensor | None) -> list[str]:
    """Reasons why the Triton kernels cannot run on these inputs; empty if they can."""
    first, *rest = [t for t in tensors if t is not None]
    reasons = requirements.why_not(
        first, *rest, head_dim=first.shape[-1], max_head_dim=MAX_HEAD_DIM
    )
    if window_size > MAX_WINDOW and tensors[0] is not None:
        reasons.append(f"window_size {window_size} is above {MAX_WINDOW}")
    return reasons


_TENSORS = (
    "Tensor? q, Tensor? k, Tensor? v, Tensor? low_q, Tensor? low_k, Tensor? low_v, "
    "Tensor? pad_k, Tensor? pad_v, SymInt window_size, float scale, bool masked, bool keep, "
    "str backend"
)
# Defined by schema for the time of a call: see `common.autograd`.
torch.library.define("visprune::hilo_attention", f"({_TENSORS}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "visprune::hilo_attention_backward",
    f"(Tensor grad, Tensor out, Tensor lse, {_TENSORS}) -> Tensor[]",
)
hilo_forward = torch.ops.visprune.hilo_attention.default
hilo_backward = torch.ops.visprune.hilo_attention_backward.default


def _impl(backend: str) -> Any:
    """The module that computes: ``torch_impl`` or ``triton_impl``, with the same functions."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl
    return torch_impl


@torch.library.impl("visprune::hilo_attention", ("cpu", "cuda"))
@uncast
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """[B, H, W, Hh + Hl, d] and what the backward is given of it."""
    *inputs, keep, backend = args
    more = (keep,) if backend == "torch" else ()
    out: tuple[Tensor, Tensor] = _impl(backend).hilo_attention(*inputs, *more)
    return out


@torch.library.impl("visprune::hilo_attention_backward", ("cpu", "cuda"))
@uncast
def _backward_impl(
    grad: Tensor, out: Tensor, lse: Tensor,
    q: Tensor | None, k: Tensor | None, v: Tensor | None,
    low_q: Tensor | None, low_k: Tensor | None, low_v: Tensor | None,
    pad_k: Tensor | None, pad_v: Tensor | None,
    window_size: int, scale: float, masked: bool, keep: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the eight tensors; an empty one stands for an input that is None."""
    impl = _impl(backend)
    given = (q, k, v, low_q, low_k, low_v, pad_k, pad_v)
    got: list[Tensor | None] = [None] * len(given)
    known: tuple[Tensor, ...] = ()
    if keep and backend == "torch" and out.numel():
        count, _ = torch_impl.num_kept(q, low_q, low_k, window_size)
        known, lse = (lse[:count],) if count else (), lse[count:]
    if out.numel():
        split = 0 if q is None else q.shape[3]
        if q is not None and k is not None and v is not None and split:
            high = (grad[:, :, :, :split], q, k, v, pad_k, pad_v)
            found = impl.high_backward(*high, window_size, scale, masked, *known)
            got[:3], got[6:] = found[:3], found[3:]
        if low_q is not None and low_k is not None and low_v is not None and low_q.shape[3]:
            low = (grad[:, :, :, split:], out[:, :, :, split:], lse, low_q, low_k, low_v)
            got[3:6] = impl.low_backward(*low, scale)
    # A custom op returns fresh tensors whose strides do not depend on the path taken.
    like = torch.contiguous_format
    back = []
    for t, g in zip(given, got, strict=True):
        if t is None:
            back.append(grad.new_empty(0))
        elif g is None:
            back.append(torch.zeros_like(t, memory_format=like))
        else:
            back.append(g.to(t.dtype).contiguous())
    return back


@torch.library.register_fake("visprune::hilo_attention")
def _(q: Any, k: Any, v: Any, low_q: Any, low_k: Any, low_v: Any, *rest: Any) -> Any:
    like = q if q is not None else low_q
    b, height, width, _, d = like.shape
    heads = sum(t.shape[3] for t in (q, low_q) if t is not None)
    out = like.new_empty(b, height, width, heads, d)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    *_, window_size, _scale, _masked, keep, backend = rest
    if low_q is not None and low_k is not None and out.numel():
        keys = low_k.shape[1] * low_k.shape[2]
        rows = (b, low_q.shape[3], height * width)
        if low_q.shape[3] and backend == "triton":
            return out, low_q.new_empty(*rows, 2, dtype=wide)
        if low_q.shape[3] and torch_impl.fused(keys, low_q):
            return out, low_q.new_empty(rows, dtype=wide)
    count = 0
    if keep and backend == "torch" and out.numel():
        count = sum(torch_impl.num_kept(q, low_q, low_k, window_size))
    return out, like.new_empty(count, dtype=wide)


@torch.library.register_fake("visprune::hilo_attention_backward")
def _(grad: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> list[Tensor]:
    like = torch.contiguous_format
    return [
        grad.new_empty(0) if t is None else torch.empty_like(t, memory_format=like)
        for t in rest[:8]
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.rest = inputs[8:]


def _backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        again = gradients_of(dense.hilo_attention, (*tensors, *ctx.rest[:-2]), (grad,))
        return (*again, None, None)
    got = hilo_backward(grad, out, lse, *tensors, *ctx.rest)
    found = [None if t is None else g for t, g in zip(tensors, got, strict=True)]
    return (*found, *[None] * 5)


differentiable("visprune::hilo_attention", _setup, _backward)


def in_plain_operators(*args: Any) -> tuple[Tensor, Tensor]:
    """``visprune::hilo_attention`` for a runtime that does not know it; nobody reads the second."""
    *given, _keep, _backend = args
    like = next(a for a in given if isinstance(a, Tensor))
    out = dense.hilo_attention(*(wide_or_other(a) for a in given)).to(like.dtype)
    return out, out.new_empty(0)


PLAIN: dict[Any, Callable[..., Any]] = {hilo_forward: in_plain_operators}


def hilo_attention(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    low_q: Tensor | None,
    low_k: Tensor | None,
    low_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window_size: int,
    scale: float,
    masked: bool,
    backend: str,
) -> Tensor:
    """The result alone: [B, H, W, Hh + Hl, d], high heads first."""
    given = (q, k, v, low_q, low_k, low_v, pad_k, pad_v)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    out: Tensor = hilo_forward(*given, window_size, scale, masked, keep, backend)[0]
    return out


def hilo_pool(x: Tensor, window_size: int, masked: bool) -> Tensor:
    """Mean of every window of ``x`` [B, H, W, C] -> [B, ceil(H / ws), ceil(W / ws), C].

    Padded tokens are zeros that count in the mean, or, ``masked``, do not count.
    """
    if window_size == 1:
        return x
    if 0 in x.shape:
        rows, cols = torch_impl.grid(x.shape[1], x.shape[2], window_size)
        return x.new_zeros(x.shape[0], rows, cols, x.shape[3])
    # [B, H, W, C] seen as channels-last [B, C, H, W]: the kernel for that layout is 50 times as
    # fast as a mean over a reshaped view.
    pooled = torch.nn.functional.avg_pool2d(
        x.permute(0, 3, 1, 2),
        window_size,
        ceil_mode=True,
        divisor_override=None if masked else window_size**2,
    )
    return pooled.permute(0, 2, 3, 1)


def hilo_layer(
    x: Tensor,
    head_dim: int,
    h_qkv: Linear | None,
    h_proj: Linear | None,
    l_q: Linear | None,
    l_kv: Linear | None,
    l_proj: Linear | None,
    window_size: int,
    scale: float,
    masked: bool,
    backend: str,
) -> Tensor:
    """Projections, pooling and attention: ``x`` [B, H, W, C] -> [B, H, W, channels]."""
    q = k = v = low_q = low_k = low_v = pad_k = pad_v = None
    b, height, width, channels = x.shape
    tokens = x.reshape(-1, channels)
    split = 0
    if h_qkv is not None:
        weight, bias = h_qkv
        split = weight.shape[0] // 3
        heads = split // head_dim
        both = linear(tokens, weight, bias).view(b, height, width, 3, heads, head_dim)
        q, k, v = both.unbind(3)
        if bias is not None and (height % window_size or width % window_size):
            _, pad_k, pad_v = bias.to(q.dtype).view(3, heads, head_dim).unbind(0)
    if l_q is not None and l_kv is not None:
        heads = l_q[0].shape[0] // head_dim
        low_q = linear(tokens, *l_q).view(b, height, width, heads, head_dim)
        pooled = hilo_pool(x, window_size, masked)
        rows, cols = pooled.shape[1:3]
        both = linear(pooled.reshape(-1, channels), *l_kv)
        low_k, low_v = both.view(b, rows, cols, 2, heads, head_dim).unbind(3)
    tensors = (q, k, v, low_q, low_k, low_v, pad_k, pad_v)
    if backend == "torch" and _plain_is_faster(x, q, low_q, low_k, window_size):
        attended = dense.hilo_attention(*tensors, window_size, scale, masked)
    else:
        attended = hilo_attention(*tensors, window_size, scale, masked, backend)
    out = attended.reshape(b * height * width, attended.shape[3] * head_dim)
    if h_proj is None or l_proj is None:
        (only,) = (pair for pair in (h_proj, l_proj) if pair is not None)
        whole = linear(out, *only)
    else:  # each branch has its own projection: nothing mixes the two
        # `split`, not two slices: their gradient would be two padded tensors and a sum.
        high, low = out.split((split, out.shape[1] - split), 1)
        whole = side_by_side(high, h_proj, low, l_proj)
    return whole.view(b, height, width, whole.shape[1])


def _plain_is_faster(
    x: Tensor, q: Tensor | None, low_q: Tensor | None, low_k: Tensor | None, window_size: int
) -> bool:
    """Whether a small layer is trained on a CPU: PyTorch's own gradients then take less time.

    The operator with its gradient costs 4 to 10 % of a layer over 7 x 7 or 14 x 14 tokens.
    """
    cpu = x.device.type == "cpu" and x.dtype.itemsize >= 4 and torch.is_grad_enabled()
    projected = [t for t in (q, low_q) if t is not None]
    if not cpu or not any(t.requires_grad for t in projected) or watched():
        return False
    return 0 < sum(torch_impl.num_kept(q, low_q, low_k, window_size)) <= MAX_PLAIN


def side_by_side(high: Tensor, h_proj: Linear, low: Tensor, l_proj: Linear) -> Tensor:
    """Both projections next to one another, [tokens, channels of high + channels of low]."""
    pairs = (high, h_proj), (low, l_proj)
    kind = high.device.type
    # `meta` and its like know no autocast.
    cast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if cast or watched or torch.is_grad_enabled():
        return torch.cat([linear(x, *pair) for x, pair in pairs], 1)
    # Into its place at once: the copy is 3 % of a layer on two CPU threads.
    split = h_proj[0].shape[0]
    whole = high.new_empty(len(high), split + l_proj[0].shape[0])
    places = whole[:, :split], whole[:, split:]
    for (x, (weight, bias)), place in zip(pairs, places, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=place)
        else:
            torch.addmm(bias, x, weight.t(), out=place)
    return whole


def _products(shapes: tuple[Any, ...], window_size: int) -> int:
    """Multiply-adds of one of the products (scores, or probabilities times values)."""
    q, low_q, low_k = shapes[0], shapes[3], shapes[4]
    total = 0
    if q is not None:
        b, height, width, heads, d = q
        rows, cols = torch_impl.grid(height, width, window_size)
        total += b * rows * cols * window_size**4 * heads * d
    if low_q is not None:
        b, height, width, heads, d = low_q
        total += b * height * width * low_k[1] * low_k[2] * heads * d
    return int(total)


@register_flop_formula(torch.ops.visprune.hilo_attention)
def hilo_attention_flops(*args: Any, **kwargs: Any) -> int:
    """Scores and values of both branches; padded tokens of a window are priced as computed."""
    return 4 * _products(args[:8], args[8])


@register_flop_formula(torch.ops.visprune.hilo_attention_backward)
def hilo_backward_flops(*args: Any, **kwargs: Any) -> int:
    """Five products where the forward has two, as the counter prices attention."""
    return 10 * _products(args[3:11], args[11])
