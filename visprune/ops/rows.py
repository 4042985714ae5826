# SPDX-License-Identifier: Apache-2.0
"""Attention rows and column sums (see ``visprune.ops``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import ConfigError
from visprune.kernels.attention_rows import op as rows_op
from visprune.ops.check import choose, floating, one_of, shape


def attention_rows(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    reduce: str = "none",
    query_idx: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax rows of a few queries over all keys, never N x N; differentiable in q and k.

    Args:
        q: [B, H, R, d] the rows wanted, after rotary embedding.
        k: [B, Hkv, N, d], H a multiple of Hkv (the groups share a key head, none is repeated).
        scale: of the scores; None means ``d ** -0.5``.
        mask: broadcastable to [B, H, R, N], four dimensions: bool (True = may be seen) or
            additive. A constant: no gradient flows into it.
        reduce: over heads: ``"none"``, ``"mean"``, ``"max"`` or ``"sum"``.
        query_idx: int64 [R] or [B, R], with ``causal``: the key position of each row. None:
            the rows are the last R positions.
        causal: row r sees only the keys up to its own position.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask (Gemma).
        backend: see the module.

    Returns:
        fp32 (fp64 for fp64 input) [B, H, R, N], or [B, R, N] if reduced. A row that may see
        no key is zero.

    Raises:
        ConfigError: a wrong shape, dtype or name.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "attention_rows"
    one_of(f"{name}: reduce", reduce, ("none", "mean", "max", "sum"))
    _check_qk(name, q, k, mask, softcap)
    if query_idx is not None and not causal:
        raise ConfigError(f"{name}: query_idx gives positions for causal=True; got causal=False.")
    batch, _, rows, dim = q.shape
    n = k.shape[2]
    row_pos = None
    if causal:
        row_pos = torch.arange(n - rows, n, device=q.device) if query_idx is None else query_idx
        row_pos = row_pos[None] if row_pos.ndim == 1 else row_pos
        if row_pos.ndim != 2 or row_pos.shape[1] != rows or row_pos.shape[0] not in (1, batch):
            raise ConfigError(
                f"{name}: query_idx must be [{rows}] or [{batch}, {rows}]; "
                f"got {list(row_pos.shape)}."
            )
    choice = choose(name, backend, q.device, lambda: rows_op.why_not(q, k, mask, row_pos))
    scale = dim**-0.5 if scale is None else scale
    args = (scale, mask, row_pos, reduce, float(softcap or 0.0), choice)
    return rows_op.rows(q, k, *args)


def column_sums(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    block: int = 128,
    row_weight: Tensor | None = None,
    reduce: str = "mean",
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention that every key receives from all rows, in blocks of rows, never N x N.

    ``out[b, j] = sum_i w_i P[b, i, j]`` with ``P`` as in :func:`attention_rows`, so with
    ``reduce="mean"`` and no weights the result of a sequence sums to its number of rows.

    Args:
        q: [B, H, R, d].
        k: [B, Hkv, N, d].
        scale: of the scores; None means ``d ** -0.5``.
        mask: as in :func:`attention_rows`; a size of 1 along R or N stays broadcast.
        causal: row i is position N - R + i and sees the keys up to it.
        block: rows at a time on the PyTorch path (memory B * H * block * N).
        row_weight: [B, R], e.g. 0 for padded queries; None means ones. A constant.
        reduce: over heads: ``"mean"``, ``"sum"`` or ``"none"``.
        softcap: as in :func:`attention_rows`.
        backend: see the module.

    Returns:
        fp32 [B, N], or [B, H, N] for ``reduce="none"``.

    Raises:
        ConfigError: a wrong shape, dtype or name.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "column_sums"
    one_of(f"{name}: reduce", reduce, ("none", "mean", "sum"))
    _check_qk(name, q, k, mask, softcap)
    shape(name, "row_weight", row_weight, (q.shape[0], q.shape[2]))
    if block < 1:
        raise ConfigError(f"{name}: block must be at least 1; got {block}.")
    choice = choose(name, backend, q.device, lambda: rows_op.why_not(q, k, mask, row_weight))
    args = (mask, causal, row_weight, reduce, block, float(softcap or 0.0), choice)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return rows_op.column_sums(q, k, scale, *args)


def _check_qk(name: str, q: Tensor, k: Tensor, mask: Tensor | None, softcap: float | None) -> None:
    floating(name, q=q, k=k)
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ConfigError(
            f"{name}: q must be [B, H, R, d] and k [B, Hkv, N, d]; "
            f"got {list(q.shape)} and {list(k.shape)}."
        )
    if q.dtype != k.dtype:
        raise ConfigError(f"{name}: q and k must have one dtype; got {q.dtype} and {k.dtype}.")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ConfigError(
            f"{name}: the query heads must be a multiple of the key heads; "
            f"got {q.shape[1]} and {k.shape[1]}."
        )
    if softcap is not None and softcap <= 0:
        raise ConfigError(f"{name}: softcap must be positive or None; got {softcap}.")
    if mask is None:
        return
    want = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, want, strict=True)):
        raise ConfigError(
            f"{name}: mask must be broadcastable to [B, H, R, N] = {list(want)} with four "
            f"dimensions; got {list(mask.shape)}. A key mask [B, N] is mask[:, None, None]."
        )
