# SPDX-License-Identifier: Apache-2.0
"""Custom ops ``visprune::sparse_attention``, ``block_sparse_attention`` and ``lowrank_topk``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from visprune.kernels.common import requirements
from visprune.kernels.common.autograd import gradients_of
from visprune.kernels.common.precision import operator, wide, wide_or_other

from . import blocks as block_impl
from . import reference, torch_impl

MAX_HEAD_DIM = 256
MAX_COLUMNS = 16384  # a row of scores stays in one program's registers


def why_not(first: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the Triton kernels cannot run on these inputs; empty if they can."""
    given = [t for t in (first, *others) if t is not None]
    floats = [t for t in given if t.is_floating_point()]
    widest = max(t.shape[-1] for t in floats) if first.ndim == 4 else 0
    return requirements.why_not(*given, head_dim=widest, max_head_dim=MAX_HEAD_DIM)


def why_not_topk(coef: Tensor, basis: Tensor, mask: Tensor | None) -> list[str]:
    """The same for :func:`lowrank_topk`, whose last axes are a rank and a number of tokens."""
    reasons = why_not(coef, basis[..., :0], mask)
    if basis.shape[-1] > MAX_COLUMNS:
        reasons.append(f"N = {basis.shape[-1]} is above {MAX_COLUMNS}")
    return reasons


@operator("visprune::sparse_attention")
def sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """[B, H, N, dv]; for the backward probabilities [B, H, N, K] (triton: norms)."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.sparse_attention(q, k, v, idx, scale)
    return torch_impl.sparse_attention(q, k, v, idx, scale)


@operator("visprune::sparse_attention_backward")
def sparse_backward(
    grad: Tensor, out: Tensor, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor,
    scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.sparse_backward(grad, out, kept, q, k, v, idx, scale)
    return torch_impl.sparse_backward(grad, kept, q, k, v, idx, scale)


@operator("visprune::block_sparse_attention")
def block_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int,
    scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, H, N, dv]; for the backward its log-sum-exp [B, H, N] (triton: norms)."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.block_sparse_attention(q, k, v, blocks, block_q, block_k, scale)
    return block_impl.block_sparse_attention(q, k, v, blocks, block_q, block_k, scale)


@operator("visprune::block_sparse_attention_backward")
def block_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor,
    block_q: int, block_k: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    args = (grad, out, lse, q, k, v, blocks, block_q, block_k, scale)
    if backend == "triton":
        from . import triton_impl

        return triton_impl.block_backward(*args)
    return block_impl.block_backward(*args)


@operator("visprune::lowrank_topk")
def lowrank_topk(
    coef: Tensor,
    basis: Tensor,
    num_keep: int,
    threshold: float | None,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    """int64 [B, H, R, num_keep], rising, -1 after the last."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.lowrank_topk(coef, basis, num_keep, threshold, mask)
    return torch_impl.lowrank_topk(coef, basis, num_keep, threshold, mask)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@sparse_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, scale: float, backend: str) -> Any:
    shape = (*q.shape[:3], 2) if backend == "triton" else idx.shape
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(shape, dtype=_wide(q))


@block_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    shape = (*q.shape[:3], 2) if rest[-1] == "triton" else q.shape[:3]
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(shape, dtype=_wide(q))


@sparse_backward.register_fake
@block_backward.register_fake
def _(grad: Tensor, out: Tensor, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


@lowrank_topk.register_fake
def _(coef: Tensor, basis: Tensor, num_keep: int, *_: Any) -> Tensor:
    return coef.new_empty((*coef.shape[:3], num_keep), dtype=torch.long)


def _setup_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward_sparse(ctx: Any, grad: Tensor, _kept: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        inputs = (*ctx.saved_tensors[2:], ctx.scale)
        return (*gradients_of(reference.sparse_attention, inputs, (grad,)), None)
    got = sparse_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend)
    return (*got, None, None, None)


def _setup_block(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:4])
    ctx.rest = inputs[4:]


def _backward_block(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        inputs = (*ctx.saved_tensors[2:], *ctx.rest[:-1])
        return (*gradients_of(reference.block_sparse_attention, inputs, (grad,)), None)
    return (*block_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 5)


sparse_forward.register_autograd(_backward_sparse, setup_context=_setup_sparse)
block_forward.register_autograd(_backward_block, setup_context=_setup_block)


def sparse_in_plain_operators(*args: Any) -> tuple[Tensor, Tensor]:
    """``visprune::sparse_attention`` for a runtime that does not know it."""
    *given, _backend = args
    out = reference.sparse_attention(*(wide_or_other(a) for a in given))
    return out.to(args[2].dtype), out.new_empty(0)  # nobody reads the second


def block_in_plain_operators(*args: Any) -> tuple[Tensor, Tensor]:
    """``visprune::block_sparse_attention`` for a runtime that does not know it."""
    *given, _backend = args
    out = reference.block_sparse_attention(*(wide_or_other(a) for a in given))
    return out.to(args[2].dtype), out.new_empty(0)


def topk_in_plain_operators(
    coef: Tensor,
    basis: Tensor,
    num_keep: int,
    threshold: float | None,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    """``visprune::lowrank_topk`` for a runtime that does not know it."""
    return reference.lowrank_topk(wide(coef), wide(basis), num_keep, threshold, mask)


PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.visprune.sparse_attention.default: sparse_in_plain_operators,
    torch.ops.visprune.block_sparse_attention.default: block_in_plain_operators,
    torch.ops.visprune.lowrank_topk.default: topk_in_plain_operators,
}


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, scale: float, backend: str
) -> Tensor:
    """The result alone: [B, H, N, dv]."""
    out: Tensor = sparse_forward(q, k, v, idx, scale, backend)[0]
    return out


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int,
    scale: float, backend: str,
) -> Tensor:  # fmt: skip
    """The result alone: [B, H, N, dv]."""
    out: Tensor = block_forward(q, k, v, blocks, block_q, block_k, scale, backend)[0]
    return out


def _pairs(idx: Any) -> int:
    b, h, n, width = idx
    return int(b * h * n * width)


@register_flop_formula(torch.ops.visprune.sparse_attention)
def sparse_attention_flops(q: Any, k: Any, v: Any, idx: Any, *args: Any, **kwargs: Any) -> int:
    """Scores and values of the pairs that the index has room for, whatever path computes them."""
    return 2 * _pairs(idx) * (q[3] + v[3])


@register_flop_formula(torch.ops.visprune.sparse_attention_backward)
def sparse_backward_flops(
    grad: Any, out: Any, kept: Any, q: Any, k: Any, v: Any, idx: Any, *args: Any, **kwargs: Any
) -> int:
    """Five products where the forward has two, as the counter prices attention."""
    return 2 * _pairs(idx) * (3 * q[3] + 2 * v[3])


def _seen_pairs(q: Tensor, k: Tensor, blocks: Tensor, block_q: int, block_k: int) -> int:
    """Query-key pairs of the blocks in the mask; all of them where its values are not known."""
    n, keys = q.shape[2], k.shape[2]
    if blocks.is_meta or isinstance(blocks, FakeTensor):
        return int(q.shape[0] * q.shape[1] * n * keys)
    seen = blocks.expand(*q.shape[:2], -1, -1).double()
    rows = torch.full((seen.shape[2],), block_q, dtype=torch.double, device=seen.device)
    cols = torch.full((seen.shape[3],), block_k, dtype=torch.double, device=seen.device)
    rows[-1:] -= len(rows) * block_q - n
    cols[-1:] -= len(cols) * block_k - keys
    return int((rows @ seen @ cols).sum())


@register_flop_formula(torch.ops.visprune.block_sparse_attention, get_raw=True)
def block_sparse_flops(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """Scores and values of the blocks that the mask holds."""
    return 2 * _seen_pairs(q, k, blocks, block_q, block_k) * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.visprune.block_sparse_attention_backward, get_raw=True)
def block_backward_flops(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor,
    block_q: int, block_k: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Five products where the forward has two, as the counter prices attention."""
    pairs = _seen_pairs(q, k, blocks, block_q, block_k)
    return 2 * pairs * (3 * q.shape[3] + 2 * v.shape[3])


@register_flop_formula(torch.ops.visprune.lowrank_topk)
def lowrank_topk_flops(coef: Any, basis: Any, *args: Any, **kwargs: Any) -> int:
    """The scores; choosing the largest is not counted."""
    return int(2 * coef[0] * coef[1] * coef[2] * coef[3] * basis[3])
