# SPDX-License-Identifier: Apache-2.0
"""Custom ops ``visprune::attention_rows`` and ``visprune::column_sums``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visprune.kernels.common import requirements
from visprune.kernels.common.autograd import watched
from visprune.kernels.common.precision import operator, uncast, wide, wide_or_other

from . import reference, torch_impl

MAX_HEAD_DIM = 256


def why_not(q: Tensor, k: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the Triton kernel cannot run on these inputs; empty if it can."""
    return requirements.why_not(q, k, *others, head_dim=q.shape[-1], max_head_dim=MAX_HEAD_DIM)


@operator("visprune::attention_rows")
def attention_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    row_pos: Tensor | None,
    reduce: str,
    softcap: float,
    backend: str,
) -> Tensor:
    """``q`` [B, H, R, d], ``k`` [B, Hkv, N, d] -> fp32 [B, H, R, N], or [B, R, N] if reduced."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.attention_rows(q, k, scale, mask, row_pos, reduce, softcap)
    return torch_impl.attention_rows(q, k, scale, mask, row_pos, reduce, softcap)


def rows(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    """:func:`attention_rows` with less time per call, where nobody sees the difference.

    A few rows over a small picture take a CPU no longer than the call of an operator.
    """
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if rest[-1] == "torch" and q.device.type == "cpu" and not learns and not watched():
        return torch_impl.attention_rows(q, k, *rest[:-1])
    found: Tensor = attention_rows(q, k, *rest)
    return found


@operator("visprune::column_sums")
def column_sums(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    row_weight: Tensor | None,
    reduce: str,
    block: int,
    softcap: float,
    backend: str,
) -> Tensor:
    """Attention each key receives -> fp32 [B, N], or [B, H, N] for ``reduce="none"``."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.column_sums(q, k, scale, mask, causal, row_weight, reduce, softcap)
    args = (q, k, scale, mask, causal, row_weight, reduce, block, softcap)
    return torch_impl.column_sums(*args)


def rows_in_plain_operators(*args: Any) -> Tensor:
    """``visprune::attention_rows`` for a runtime that does not know it."""
    return reference.attention_rows(*(wide_or_other(a) for a in args[:-1]))


PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.visprune.attention_rows.default: rows_in_plain_operators
}


def _out_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@attention_rows.register_fake
def _(q: Tensor, k: Tensor, scale: float, mask: Any, row_pos: Any, reduce: str, *_: Any) -> Tensor:
    b, h, r, _d = q.shape
    shape = (b, h, r, k.shape[2]) if reduce == "none" else (b, r, k.shape[2])
    return q.new_empty(shape, dtype=_out_dtype(q))


@column_sums.register_fake
def _(
    q: Tensor, k: Tensor, scale: float, mask: Any, causal: bool, w: Any, reduce: str, *_: Any
) -> Tensor:
    shape = (q.shape[0], q.shape[1], k.shape[2]) if reduce == "none" else (q.shape[0], k.shape[2])
    return q.new_empty(shape, dtype=_out_dtype(q))


def _score_grads(
    p: Tensor, grad_p: Tensor, q: Tensor, k: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """From probabilities and their gradient [B, H, R, N] to the gradients of q and k."""
    b, h, r, d = q.shape
    kv, n = k.shape[1], k.shape[2]
    grad = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
    if softcap:
        grad = grad * (1 - torch.tanh((torch_impl.logits(q, k, scale, 0.0)) / softcap).square())
    grad = (grad * scale).reshape(b, kv, h // kv * r, n)
    grad_q = (grad @ k).reshape(q.shape)
    grad_k = grad.transpose(2, 3) @ q.reshape(b, kv, h // kv * r, d)
    return grad_q, grad_k


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, mask, row_pos, ctx.reduce, ctx.softcap, _ = inputs
    ctx.save_for_backward(q, k, mask, row_pos)


@uncast
def _backward_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recompute the few rows; a head maximum sends its gradient evenly to the heads that tie."""
    q, k, mask, row_pos = ctx.saved_tensors
    qw, kw = wide(q), wide(k)
    if 0 in (*q.shape[:3], k.shape[2]):
        return (torch.zeros_like(q), torch.zeros_like(k), *[None] * 6)
    s = torch_impl.logits(qw, kw, ctx.scale, ctx.softcap)
    p = torch_impl.probabilities(s, mask, row_pos)
    if ctx.reduce == "max":
        top = (p == p.amax(1, keepdim=True)).to(p.dtype)
        grad = grad[:, None] * top / top.sum(1, keepdim=True)
    elif ctx.reduce != "none":
        grad = grad[:, None] / (q.shape[1] if ctx.reduce == "mean" else 1)
    grad_q, grad_k = _score_grads(p, grad, qw, kw, ctx.scale, ctx.softcap)
    return (grad_q.to(q.dtype), grad_k.to(k.dtype), *[None] * 6)


def _setup_columns(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, mask, ctx.causal, weight, ctx.reduce, ctx.block, ctx.softcap, _ = inputs
    ctx.save_for_backward(q, k, mask, weight)


@uncast
def _backward_columns(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Blocks of rows again: every row of a block sees the same gradient, times its weight."""
    q, k, mask, weight = ctx.saved_tensors
    qw, kw = wide(q), wide(k)
    rows, n = q.shape[2], k.shape[2]
    if ctx.reduce != "none":
        grad = (grad / (q.shape[1] if ctx.reduce == "mean" else 1))[:, None]
    parts, grad_k = [], torch.zeros_like(kw)
    for start in range(0, rows if n and len(q) else 0, ctx.block):
        stop = min(start + ctx.block, rows)
        args = (qw, kw, ctx.scale, mask, ctx.causal, ctx.softcap, start, stop, n)
        p = torch_impl.block_probabilities(*args)
        grad_p = grad[:, :, None, :]
        if weight is not None:
            grad_p = grad_p * weight[:, None, start:stop, None].to(p.dtype)
        part_q, part_k = _score_grads(p, grad_p, qw[:, :, start:stop], kw, ctx.scale, ctx.softcap)
        parts.append(part_q)
        grad_k = grad_k + part_k
    grad_q = torch.cat(parts, 2) if parts else torch.zeros_like(qw)
    return (grad_q.to(q.dtype), grad_k.to(k.dtype), *[None] * 8)


attention_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
column_sums.register_autograd(_backward_columns, setup_context=_setup_columns)


@register_flop_formula(torch.ops.visprune.attention_rows)
def attention_rows_flops(q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Scores only (2 d per query, head and key), as the counter prices matrix products."""
    b, h, r, d = q_shape
    return int(2 * b * h * r * k_shape[2] * d)


@register_flop_formula(torch.ops.visprune.column_sums)
def column_sums_flops(
    q_shape: Any, k_shape: Any, scale: Any, mask: Any, causal: bool, *args: Any, **kwargs: Any
) -> int:
    """Scores of all rows; with ``causal`` only of the keys that a row may see."""
    b, h, r, d = q_shape
    n = k_shape[2]
    full = min(r, n)
    pairs = full * (full + 1) // 2 + full * (n - full) if causal else r * n
    return int(2 * b * h * pairs * d)
