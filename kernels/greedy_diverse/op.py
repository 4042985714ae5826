# SPDX-License-Identifier: Apache-2.0
"""Custom op ``visprune::greedy_diverse``: dispatch, shapes for tracing, FLOP count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visprune.kernels.common import requirements
from visprune.kernels.common.precision import operator

from . import torch_impl

MAX_TOKENS = 16384


def why_not(x: Tensor) -> list[str]:
    """Reasons why the Triton kernel cannot run on ``x`` [B, N, D]; empty if it can."""
    reasons = requirements.why_not(x)
    if x.shape[-2] > MAX_TOKENS:
        reasons.append(f"{x.shape[-2]} tokens are above {MAX_TOKENS}, what one program holds")
    return reasons


@operator("visprune::greedy_diverse")
def greedy_diverse(
    x: Tensor,
    keep: Tensor | None,
    width: int,
    objective: str,
    rule: str,
    pivot: Tensor | None,
    relevance: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    """``x`` [B, N, D] -> kept indices in selection order, int64 [B, width], -1 = nothing."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl.select(x, keep, width, objective, rule, pivot, relevance, mask)
    return torch_impl.select(x, keep, width, objective, rule, pivot, relevance, mask)


@greedy_diverse.register_fake
def _(x: Tensor, keep: Any, width: int, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], width), dtype=torch.long)


@register_flop_formula(torch.ops.visprune.greedy_diverse)
def greedy_diverse_flops(
    x_shape: Any, keep: Any, width: int, objective: str, rule: str, *args: Any, **kwargs: Any
) -> int:
    """Cosines of every token with every kept one (2 D each), plus what the first pick needs.

    The count of the rule, not of a path: the exact paths prune some of these products away.
    """
    batch, n, dim = x_shape
    pairs = n * width + (n * (n - 1) // 2 if rule == "farthest_neighbor" else 0)
    update = n * width * (width + 1) if objective == "dpp" else n * width
    return int(batch * (2 * dim * pairs + update))
