# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton path: one Gram matrix by the vendor's GEMM, then the whole greedy loop in one kernel.

One program per image keeps the scores of all its tokens in registers; k launches of small
operations become one. Ties keep the lower index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visprune.kernels.common.triton_launch import launch

from . import torch_impl


@triton.jit
def _distance_kernel(
    gram, gone, pick, out, n, width, stride_gram, MAX_SUM: tl.constexpr, BLOCK: tl.constexpr
):
    """k_center and max_sum: fold the column of the last pick into the scores, take the lowest."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    dead = tl.load(gone + b * n + at, mask=inside, other=1) != 0
    score = tl.zeros([BLOCK], tl.float32)
    if not MAX_SUM:
        score -= float("inf")
    score = tl.where(dead, float("inf"), score)
    here = tl.load(pick + b)
    for i in range(width):
        tl.store(out + b * width + i, here)
        column = tl.load(gram + b * stride_gram + here * n + at, mask=inside, other=0.0)
        if MAX_SUM:
            score += column
        else:
            score = tl.maximum(score, column)
        score = tl.where(at == here, float("inf"), score)
        here = tl.argmin(score, axis=0, tie_break_left=True).to(tl.int64)


@triton.jit
def _dpp_kernel(
    gram, rel, residual_in, chol, pick, out, n, width, stride_gram, BLOCK: tl.constexpr
):
    """Greedy MAP: rows of the Cholesky factor [width, n] grow in ``chol``."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    chol_b = chol + b * width * n
    residual = tl.load(residual_in + b * n + at, mask=inside, other=float("-inf"))
    relevance = tl.load(rel + b * n + at, mask=inside, other=0.0)
    here = tl.load(pick + b)
    for i in range(width):
        tl.store(out + b * width + i, here)
        var = tl.sum(tl.where(at == here, residual, 0.0), axis=0)
        row = tl.load(gram + b * stride_gram + here * n + at, mask=inside, other=0.0)
        row = row * relevance * tl.load(rel + b * n + here)
        for t in range(i):
            factor = tl.load(chol_b + t * n + here)
            row -= factor * tl.load(chol_b + t * n + at, mask=inside, other=0.0)
        row = tl.where(var > 0, row / tl.sqrt(tl.where(var > 0, var, 1.0)), 0.0)
        tl.store(chol_b + i * n + at, row, mask=inside)
        tl.debug_barrier()  # the next round reads single entries of this row from all threads
        residual = tl.where(at == here, float("-inf"), residual - row * row)
        here = tl.argmax(residual, axis=0, tie_break_left=True).to(tl.int64)


def select(
    x: Tensor,
    keep: Tensor | None,
    width: int,
    objective: str,
    rule: str,
    pivot: Tensor | None,
    relevance: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """``x`` [B, N, D] -> int64 [B, width]; -1 where a row keeps fewer."""
    batch, n = x.shape[:2]
    out = torch.full((batch, width), -1, dtype=torch.long, device=x.device)
    if 0 in (batch, n, width):
        return out
    xn = torch_impl.unit_rows(x)
    gram = xn @ xn.transpose(1, 2)  # [B, N, N] fp32
    gone = torch.zeros_like(gram[..., 0], dtype=torch.bool) if mask is None else ~mask
    rel = torch.ones_like(gram[..., 0]) if relevance is None else relevance.float().contiguous()
    pick = torch_impl.first_pick(xn, gram, rule, pivot, rel, gone).contiguous()
    block = triton.next_power_of_2(n)
    warps = min(16, max(4, block // 512))
    if objective == "dpp":
        residual = torch_impl.start_residual(gram, rel, gone).contiguous()
        chol = torch.empty(batch, width, n, device=x.device)
        launch(
            _dpp_kernel, (batch,),
            gram, rel, residual, chol, pick, out, n, width, n * n, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    else:
        flags = gone.to(torch.int8)
        launch(
            _distance_kernel, (batch,),
            gram, flags, pick, out, n, width, n * n,
            MAX_SUM=objective == "max_sum", BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return torch_impl.pad_short_rows(out, keep, mask)
