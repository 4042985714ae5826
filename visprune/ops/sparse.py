# SPDX-License-Identifier: Apache-2.0
"""Sparse attention and the low-rank predictor of its keys (see ``visprune.ops``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import BudgetError, ConfigError
from visprune.kernels.sparse_attention import op as sparse_op
from visprune.ops.check import choose, floating, per_axis, shape


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: int | tuple[int, int] = 64,
    scale: float | None = None,
    dense_queries: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention in which every query sees its own keys, named by an index or a block mask.

    Exact softmax over exactly those keys; forward and backward through q, k and v, memory
    linear in N for a fixed K. A query that sees no key gives zeros. An index that comes twice
    in a row counts twice.

    Args:
        q: [B, H, N, d].
        k: [B, H, M, d].
        v: [B, H, M, dv].
        idx: int64 or int32 [B, H, N - dense_queries, K], the keys of each query; -1 names no
            key. Sparsifiner (arXiv 2303.13755): the result of :func:`lowrank_topk`.
        block_mask: instead of ``idx``, for high resolution: bool
            [B or 1, H or 1, ceil(N' / block_size), ceil(M / block_size)] with
            N' = N - dense_queries; True: all queries of the block see all keys of the block.
        block_size: rows and columns of a block, or (rows, columns).
        scale: of the scores; None means ``d ** -0.5``.
        dense_queries: the first so many queries see every key (a class token: 1).
        backend: see ``visprune.ops``.

    Returns:
        [B, H, N, dv] in the dtype of the input.

    Raises:
        ConfigError: a wrong shape or dtype, an index outside the keys (looked at on the CPU).
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "sparse_attention"
    _check_qkv(name, q, k, v)
    if (idx is None) == (block_mask is None):
        got = "neither" if idx is None else "both"
        raise ConfigError(f"{name}: give idx or block_mask; got {got}.")
    if not 0 <= dense_queries <= q.shape[2]:
        raise ConfigError(
            f"{name}: dense_queries must be in 0..{q.shape[2]} (the queries given); "
            f"got {dense_queries}."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rest = q[:, :, dense_queries:]
    if idx is not None:
        _check_index(name, rest, k, idx)
        choice = choose(name, backend, q.device, lambda: sparse_op.why_not(q, k, v, idx))
        out = sparse_op.sparse_attention(rest, k, v, idx, scale, choice)
    elif block_mask is not None:
        rows, cols = _blocks(name, rest, k, block_mask, block_size)
        choice = choose(name, backend, q.device, lambda: sparse_op.why_not(q, k, v, block_mask))
        out = sparse_op.block_sparse_attention(rest, k, v, block_mask, rows, cols, scale, choice)
    if dense_queries == 0:
        return out
    whole = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    first = q[:, :, :dense_queries]
    size = (dense_queries, max(1, k.shape[2]))
    if k.shape[2] == 0:
        whole = whole[..., :0]
    seen = sparse_op.block_sparse_attention(first, k, v, whole, *size, scale, choice)
    return torch.cat((seen, out), 2)


def lowrank_topk(
    coef: Tensor,
    basis: Tensor,
    num_keep: int,
    threshold: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The columns of largest score ``coef @ basis`` in every row, the matrix never written.

    Sparsifiner's connectivity predictor (arXiv 2303.13755): ``coef`` the coefficients of each
    query, ``basis`` the attention basis over N tokens. Indices only: no gradient flows, as in
    the official code, which detaches the mask.

    Args:
        coef: [B, H, R, r].
        basis: [r, N] shared, or [B or 1, H or 1, r, N].
        num_keep: columns per row, at most N.
        threshold: take only scores above it (the official threshold mode is
            ``num_keep = N``; then a row may be as long as N).
        mask: bool [B, N], True = may be taken; None: all.
        backend: see ``visprune.ops``.

    Returns:
        int64 [B, H, R, num_keep]: rising along the last axis, -1 after the last. Ties keep the
        lower index. Half types are computed in fp32.

    Raises:
        BudgetError: ``num_keep`` negative or above N.
        ConfigError: a wrong shape or dtype.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "lowrank_topk"
    floating(name, coef=coef, basis=basis)
    if coef.ndim != 4:
        raise ConfigError(f"{name}: coef must be [B, H, R, r]; got {list(coef.shape)}.")
    basis = basis[None, None] if basis.ndim == 2 else basis
    lead = [basis.shape[i] in (1, coef.shape[i]) for i in (0, 1)] if basis.ndim == 4 else [False]
    if not all(lead) or basis.shape[2] != coef.shape[3]:
        raise ConfigError(
            f"{name}: basis must be [r, N] or [B or 1, H or 1, r, N] with B, H, _, r = "
            f"{list(coef.shape)} of coef; got {list(basis.shape)}."
        )
    if coef.dtype != basis.dtype:
        raise ConfigError(
            f"{name}: coef and basis must have one dtype; got {coef.dtype} and {basis.dtype}."
        )
    n = basis.shape[3]
    if not 0 <= num_keep <= n:
        raise BudgetError(f"{name}: num_keep must be in 0..{n} (the columns); got {num_keep}.")
    shape(name, "mask", mask, (coef.shape[0], n))
    if mask is not None and mask.dtype != torch.bool:
        raise ConfigError(f"{name}: mask must be bool, True = may be taken; got {mask.dtype}.")
    choice = choose(name, backend, coef.device, lambda: sparse_op.why_not_topk(coef, basis, mask))
    args = (coef.detach(), basis.detach(), num_keep, threshold, mask, choice)
    return sparse_op.lowrank_topk(*args)


def _check_qkv(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    floating(name, q=q, k=k, v=v)
    fits = q.ndim == k.ndim == v.ndim == 4
    fits = fits and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or k.shape[:3] != v.shape[:3]:
        raise ConfigError(
            f"{name}: q must be [B, H, N, d], k [B, H, M, d] and v [B, H, M, dv]; "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(
            f"{name}: q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}."
        )


def _check_index(name: str, q: Tensor, k: Tensor, idx: Tensor) -> None:
    if idx.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"{name}: idx must be int64 or int32; got {idx.dtype}.")
    want = list(q.shape[:3])
    if idx.ndim != 4 or list(idx.shape[:3]) != want:
        raise ConfigError(
            f"{name}: idx must be [B, H, N - dense_queries, K] = {[*want, 'K']}; "
            f"got {list(idx.shape)}."
        )
    if idx.shape[3] > k.shape[2]:
        raise ConfigError(
            f"{name}: idx may name at most M = {k.shape[2]} keys of a query; got {idx.shape[3]}."
        )
    # Reading the values waits for the device and breaks a compiled graph: only where it is free.
    if idx.numel() and idx.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = idx.aminmax()
        if int(low) < -1 or int(high) >= k.shape[2]:
            raise ConfigError(
                f"{name}: idx must be in -1..{k.shape[2] - 1} (-1: no key); "
                f"got {int(low)}..{int(high)}."
            )


def _blocks(
    name: str, q: Tensor, k: Tensor, block_mask: Tensor, size: int | tuple[int, int]
) -> tuple[int, int]:
    """Check the block mask; the rows and columns of a block."""
    rows, cols = per_axis(name, "block_size", size, 2)
    if rows < 1 or cols < 1:
        raise ConfigError(f"{name}: block_size must be at least 1; got {size}.")
    want = (-(-q.shape[2] // rows), -(-k.shape[2] // cols))
    if block_mask.dtype != torch.bool:
        raise ConfigError(f"{name}: block_mask must be bool; got {block_mask.dtype}.")
    lead = [m in (1, s) for m, s in zip(block_mask.shape, q.shape[:2], strict=False)]
    if block_mask.ndim != 4 or not all(lead) or tuple(block_mask.shape[2:]) != want:
        raise ConfigError(
            f"{name}: block_mask must be [{q.shape[0]} or 1, {q.shape[1]} or 1, {want[0]}, "
            f"{want[1]}] for blocks of {rows} x {cols}; got {list(block_mask.shape)}."
        )
    return rows, cols
