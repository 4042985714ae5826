# SPDX-License-Identifier: Apache-2.0
"""Custom ops ``visprune::neighborhood_attention``, ``na_qk``, ``na_av`` and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visprune.kernels.common import requirements
from visprune.kernels.common.autograd import differentiable, gradients_of, watched
from visprune.kernels.common.precision import operator, uncast, wide_or_other

from . import axis, bands, dense, gathered, torch_impl

MAX_HEAD_DIM = 128


def why_not(q: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the Triton kernels cannot run on these inputs; empty if they can."""
    given = [t for t in others if t is not None]
    widest = max(t.shape[-1] for t in (q, *given[:2]))
    return requirements.why_not(q, *given, head_dim=widest, max_head_dim=MAX_HEAD_DIM)


def _impl(backend: str) -> Any:
    """The module that computes: ``torch_impl`` or ``triton_impl``, with the same functions."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl
    return torch_impl


# --- fused ----------------------------------------------------------------------------------------


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values"
)
_WINDOW = "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, int[] is_causal, float scale"
# Defined by schema for the time of a call: see `common.autograd`. `is_causal` is a list of integers
# because `torch.jit.trace` knows no list of booleans.
torch.library.define(
    "visprune::neighborhood_attention",
    f"({_TENSORS}, {_WINDOW}, bool with_lse, str backend) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "visprune::neighborhood_attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_TENSORS}, Tensor out, Tensor lse, {_WINDOW}, "
    "bool rpb_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
neighborhood_attention = torch.ops.visprune.neighborhood_attention.default
neighborhood_attention_backward = torch.ops.visprune.neighborhood_attention_backward.default


@torch.library.impl("visprune::neighborhood_attention", ("cpu", "cuda"))
@uncast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``q``, ``k``, ``v`` [B, *space, H, D] -> output [B, *space, H, Dv], LSE [B, *space, H].

    Without ``with_lse`` the second may be zeros: over tiles the PyTorch path then saves the work
    (a fifth of a short call), and needs none for its backward unless there are additional keys.
    """
    layout = axis.layout(q.shape, kernel_size, stride, dilation, is_causal)
    alone = additional_keys is None or additional_values is None
    with_lse = with_lse or not alone
    dtype = q.dtype if alone else torch.promote_types(q.dtype, torch.float32)
    out, lse = _impl(backend).forward(q, k, v, rpb, layout, scale, dtype, with_lse)
    if additional_keys is not None and additional_values is not None:
        extra = torch_impl.extra_forward(q, additional_keys, additional_values, scale)
        out, lse = torch_impl.merge(out, lse, *extra)
    return out.to(q.dtype), lse


@torch.library.impl("visprune::neighborhood_attention_backward", ("cpu", "cuda"))
@uncast
def _backward_impl(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
    rpb_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rpb and the additional keys and values; empty where there is none.

    With the log-sum-exp over all keys, neighbours and additional keys do not need each other.
    """
    layout = axis.layout(q.shape, kernel_size, stride, dilation, is_causal)
    shared = additional_keys is not None and additional_values is not None
    args = (grad_out, grad_lse, q, k, v, rpb, out, lse, layout, scale, rpb_grad, shared)
    grad_q, grad_k, grad_v, grad_rpb = _impl(backend).backward(*args)
    none = [q.new_empty(0) for _ in range(3)]
    if rpb is not None and rpb_grad:
        none[0] = grad_rpb.to(rpb.dtype)
    if additional_keys is not None and additional_values is not None:
        extra = (q, additional_keys, additional_values)
        delta = torch_impl.row_terms(grad_out, grad_lse, out)
        extra_q, *none[1:] = torch_impl.extra_backward(grad_out, *extra, lse, delta, scale)
        grad_q = grad_q + extra_q
    grads = (grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype))
    return (*grads, none[0], none[1], none[2])


@torch.library.register_fake("visprune::neighborhood_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, rpb: Any, additional_keys: Any, additional_values: Any,
    kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, scale: float, with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:-1], dtype=dtype)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


@torch.library.register_fake("visprune::neighborhood_attention_backward")
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None,
    ak: Tensor | None, av: Tensor | None, out: Tensor, lse: Tensor, kernel_size: Any, stride: Any,
    dilation: Any, is_causal: Any, scale: float, rpb_grad: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    extra = (rpb if rpb_grad else None, ak, av)
    like = [q.new_empty(0) if t is None else t.new_empty(t.shape) for t in extra]
    return (*(t.new_empty(t.shape) for t in (q, k, v)), *like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel, ctx.stride, ctx.dilation, ctx.causal, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (*tensors[:6], ctx.kernel, ctx.stride, ctx.dilation, ctx.causal, ctx.scale)
        again = gradients_of(dense.neighborhood_attention, inputs, (grad_out, grad_lse))
        return (*again, None, None)
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[6])
    rpb_grad = tensors[3] is not None and ctx.needs_input_grad[3]
    args = (ctx.kernel, ctx.stride, ctx.dilation, ctx.causal, ctx.scale, rpb_grad, ctx.backend)
    grads = neighborhood_attention_backward(grad_out, grad_lse, *tensors, *args)
    given = [*([True] * 3), rpb_grad, tensors[4] is not None, tensors[5] is not None]
    kept = [g if there else None for g, there in zip(grads, given, strict=True)]
    return (*kept, *[None] * 7)


differentiable("visprune::neighborhood_attention", _setup, _backward)


def in_plain_operators(*args: Any) -> tuple[Tensor, Tensor]:
    """``visprune::neighborhood_attention`` for a runtime that does not know it."""
    *given, _with_lse, _backend = args
    out, lse = dense.neighborhood_attention(*(wide_or_other(a) for a in given))
    return out.to(args[0].dtype), lse


PLAIN: dict[Any, Callable[..., Any]] = {neighborhood_attention: in_plain_operators}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """As ``neighborhood_attention``; where one band is the way on a CPU, SDPA itself.

    On pictures that small a call of the custom op is a good part of the time: a fifth over 7 x 7
    tokens, as in the last level of NAT. Who traces, counts or casts still meets the custom op.
    """
    plain = backend == "torch" and rpb is None and additional_keys is None and not with_lse
    plain = plain and q.device.type == "cpu" and q.dtype.itemsize >= 4 and q.shape == v.shape
    if plain and not watched():
        grad = q.requires_grad or k.requires_grad or v.requires_grad
        grad = grad and torch.is_grad_enabled()
        window = (tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))
        alone = bands.alone(q.shape, *window, grad)
        if alone is not None:
            band, layout = alone
            found = bands.attend(q, k, v, band, layout, scale)
            if band.mask is None or _transformed() or gathered.finite(found.detach()):
                return found, None  # else the operator finds out, see `gathered`
    tensors = (q, k, v, rpb, additional_keys, additional_values)
    args = (scale, with_lse, backend)
    out, lse = neighborhood_attention(*tensors, kernel_size, stride, dilation, is_causal, *args)
    return out, lse


def _transformed() -> bool:
    """Whether ``torch.func`` maps or differentiates: then there are no values to look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# --- unfused --------------------------------------------------------------------------------------


@operator("visprune::na_qk")
def na_qk(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
    backend: str,
) -> Tensor:
    """Scores of each query with its K neighbours -> [B, *space, H, K]; -inf where none is."""
    layout = axis.layout(q.shape, kernel_size, stride, dilation, is_causal)
    return _impl(backend).qk(q, k, rpb, layout, scale)


@operator("visprune::na_av")
def na_av(
    attn: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    backend: str,
) -> Tensor:
    """Weights [B, *space, H, K] times the values of the neighbours -> [B, *space, H, Dv]."""
    layout = axis.layout(v.shape, kernel_size, stride, dilation, is_causal)
    return _impl(backend).av(attn, v, layout)


@operator("visprune::na_spread")
def na_spread(
    attn: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    backend: str,
) -> Tensor:
    """The transpose of ``na_av``: every query's row of ``x``, weighted, added to its neighbours."""
    layout = axis.layout(x.shape, kernel_size, stride, dilation, is_causal)
    return _impl(backend).spread(attn, x, layout)


@operator("visprune::na_bias_grad")
def na_bias_grad(
    grad: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Tensor:
    """Sum of ``grad`` [B, *space, H, K] over all pairs of one offset -> [H, 2k - 1, ...]."""
    layout = axis.layout((*grad.shape[:-1], 1), kernel_size, stride, dilation, is_causal)
    return torch_impl.bias_grad(grad, layout)


@na_qk.register_fake
def _(q: Tensor, k: Tensor, rpb: Tensor | None, kernel_size: Any, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], axis.product(kernel_size)))


@na_av.register_fake
def _(attn: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty((*attn.shape[:-1], v.shape[-1]))


@na_spread.register_fake
def _(attn: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@na_bias_grad.register_fake
def _(grad: Tensor, kernel_size: Any, *rest: Any) -> Tensor:
    return grad.new_empty((grad.shape[-2], *(2 * k - 1 for k in kernel_size)))


def _setup_qk(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, rpb, *ctx.window, ctx.scale, ctx.backend = inputs
    ctx.bias = rpb is not None
    ctx.rpb_dtype = rpb.dtype if rpb is not None else None
    ctx.save_for_backward(q, k)


def _backward_qk(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Where no neighbour is the score is constant: ``na_av`` and ``na_spread`` pass it over."""
    q, k = ctx.saved_tensors
    scaled = grad * ctx.scale
    grad_q = na_av(scaled, k, *ctx.window, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_k = na_spread(scaled, q, *ctx.window, ctx.backend) if ctx.needs_input_grad[1] else None
    grad_rpb = None
    if ctx.bias and ctx.needs_input_grad[2]:
        grad_rpb = na_bias_grad(grad, *ctx.window).to(ctx.rpb_dtype)
    return grad_q, grad_k, grad_rpb, *[None] * 6


def _setup_av(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attn, v, *ctx.window, ctx.backend = inputs
    ctx.save_for_backward(attn, v)


def _backward_av(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    attn, v = ctx.saved_tensors
    grad_attn = grad_v = None
    if ctx.needs_input_grad[0]:
        scores = na_qk(grad, v, None, *ctx.window, 1.0, ctx.backend)
        grad_attn = scores.masked_fill(scores.isneginf(), 0.0)
    if ctx.needs_input_grad[1]:
        grad_v = na_spread(attn, grad, *ctx.window, ctx.backend)
    return grad_attn, grad_v, *[None] * 5


def _setup_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attn, x, *ctx.window, ctx.backend = inputs
    ctx.save_for_backward(attn, x)


def _backward_spread(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """For gradients of gradients."""
    attn, x = ctx.saved_tensors
    scores = na_qk(x, grad, None, *ctx.window, 1.0, ctx.backend)
    grad_x = na_av(attn, grad, *ctx.window, ctx.backend)
    return scores.masked_fill(scores.isneginf(), 0.0), grad_x, *[None] * 5


def _setup_bias_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, *ctx.window = inputs
    ctx.shape = (*grad.shape[:-1], 1)


def _backward_bias_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The scores of tokens that are zero are their biases."""
    none = grad.new_zeros(ctx.shape)
    scores = na_qk(none, none, grad, *ctx.window, 1.0, "torch")
    return scores.masked_fill(scores.isneginf(), 0.0), *[None] * 4


na_spread.register_autograd(_backward_spread, setup_context=_setup_spread)
na_bias_grad.register_autograd(_backward_bias_grad, setup_context=_setup_bias_grad)
na_qk.register_autograd(_backward_qk, setup_context=_setup_qk)
na_av.register_autograd(_backward_av, setup_context=_setup_av)


# --- FLOPs ----------------------------------------------------------------------------------------


def _pairs(shape: Any, window: Any) -> int:
    """Pairs of a query and a neighbour over all images and heads; causal windows are shorter."""
    space = shape[1:-2]
    per_axis = (axis.pairs(*a) for a in zip(space, *window, strict=True))
    return int(shape[0] * shape[-2] * axis.product(per_axis))


@register_flop_formula(torch.ops.visprune.neighborhood_attention)
def neighborhood_attention_flops(
    q_shape: Any, k_shape: Any, v_shape: Any, rpb: Any, extra: Any, extra_v: Any, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """Scores and weighted sum over the neighbours and the additional keys: 2 (D + Dv) a pair."""
    pairs = _pairs(q_shape, args[:4])
    if extra is not None:
        pairs += axis.product(q_shape[:-1]) * extra[1]
    return int(2 * pairs * (q_shape[-1] + v_shape[-1]))


@register_flop_formula(torch.ops.visprune.neighborhood_attention_backward)
def neighborhood_attention_backward_flops(
    grad_shape: Any, lse_grad: Any, q_shape: Any, k_shape: Any, v_shape: Any, rpb: Any,
    extra: Any, extra_v: Any, out: Any, lse: Any, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Five products as PyTorch counts its own: scores again, dP, dV, dQ, dK."""
    pairs = _pairs(q_shape, args[:4])
    if extra is not None:
        pairs += axis.product(q_shape[:-1]) * extra[1]
    return int(2 * pairs * (3 * q_shape[-1] + 2 * v_shape[-1]))


@register_flop_formula(torch.ops.visprune.na_qk)
def na_qk_flops(q_shape: Any, k_shape: Any, rpb: Any, *args: Any, **kwargs: Any) -> int:
    """2 D for every pair."""
    return 2 * _pairs(q_shape, args[:4]) * int(q_shape[-1])


@register_flop_formula([torch.ops.visprune.na_av, torch.ops.visprune.na_spread])
def na_av_flops(attn_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    """2 Dv for every pair."""
    return 2 * _pairs(v_shape, args[:4]) * int(v_shape[-1])
