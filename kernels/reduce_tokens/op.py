# SPDX-License-Identifier: Apache-2.0
"""Custom ops ``visprune::reduce_tokens`` and ``visprune::bipartite_match``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visprune.kernels.common import requirements
from visprune.kernels.common.precision import operator, wide

from . import torch_impl
from .torch_impl import alternate_cosines as alternate_cosines


def why_not(x: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the Triton kernels cannot run on ``x`` (and index tensors); empty if they can."""
    return requirements.why_not(x, *others)


@operator("visprune::reduce_tokens")
def reduce_tokens(
    x: Tensor,
    source: Tensor | None,
    slot: Tensor | None,
    weight: Tensor | None,
    num_slots: int,
    backend: str,
) -> Tensor:
    """``x`` [B, N, D] -> [B, num_slots, D]; entries [B, E] name a token, a slot, a weight."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.reduce_tokens(x, source, slot, weight, num_slots)
    return torch_impl.reduce_tokens(x, source, slot, weight, num_slots)


@reduce_tokens.register_fake
def _(x: Tensor, source: Any, slot: Any, weight: Any, num_slots: int, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], num_slots, x.shape[2]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, source, slot, weight, ctx.num_slots, ctx.backend = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(x, source, slot, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transposed map for ``x``; for a weight, its token times the gradient of its slot."""
    x, source, slot, weight = ctx.saved_tensors
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = reduce_tokens(grad.contiguous(), slot, source, weight, ctx.tokens, ctx.backend)
    if weight is not None and ctx.needs_input_grad[3]:
        at_slot = _rows(grad, slot, ctx.backend)
        at_token = _rows(x, source, ctx.backend)
        product = wide(at_slot) * wide(at_token)
        grad_w = product.sum(-1).to(weight.dtype)
    return grad_x, None, None, grad_w, None, None


def _rows(x: Tensor, index: Tensor | None, backend: str) -> Tensor:
    if index is None:
        return x
    return reduce_tokens(x, index, None, None, index.shape[1], backend)


reduce_tokens.register_autograd(_backward, setup_context=_setup)


@operator("visprune::bipartite_match")
def bipartite_match(
    metric: Tensor, r: int, class_token: bool, distill_token: bool, backend: str
) -> Tensor:
    """``metric`` [B, T, C] -> the slot of every token after merging ``r`` pairs, int64 [B, T]."""
    batch, count, _ = metric.shape
    if r == 0 or batch == 0:
        return torch.arange(count, device=metric.device).repeat(batch, 1)
    if backend == "triton":
        from . import triton_impl

        value, partner = triton_impl.best_partners(metric, class_token, distill_token)
    else:
        value, partner = torch_impl.best_partners(metric, class_token, distill_token)
    args = (count, r, class_token, distill_token)
    return torch_impl.slots_from_partners(value, partner, *args)


@bipartite_match.register_fake
def _(metric: Tensor, *rest: Any) -> Tensor:
    return metric.new_empty(metric.shape[:2], dtype=torch.long)


@register_flop_formula(torch.ops.visprune.reduce_tokens)
def reduce_tokens_flops(
    x_shape: Any, source: Any, slot: Any, weight: Any, num_slots: Any, *args: Any, **kwargs: Any
) -> int:
    """A multiplication and an addition per weighted entry and feature; a gather is free."""
    batch, n, dim = x_shape
    entries = next((s[1] for s in (source, slot) if s is not None), n)
    return int(batch * entries * dim * ((weight is not None) + (slot is not None)))


@register_flop_formula(torch.ops.visprune.bipartite_match)
def bipartite_match_flops(metric_shape: Any, r: int, *args: Any, **kwargs: Any) -> int:
    """Cosines of every even with every odd token."""
    batch, count, dim = metric_shape
    return int(2 * batch * ((count + 1) // 2) * (count // 2) * dim) if r else 0
