# SPDX-License-Identifier: Apache-2.0
"""Gather, merge, un-merge and ToMe's matching (see ``visprune.ops``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import BudgetError, ConfigError
from visprune.kernels.reduce_tokens import op as reduce_op
from visprune.ops.check import choose, floating


def reduce_tokens(
    x: Tensor,
    num_slots: int,
    source: Tensor | None = None,
    slot: Tensor | None = None,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply a weighted map from N tokens to K slots, given entry by entry.

    ``y[b, s] = sum over e with slot[b, e] = s of weight[b, e] * x[b, source[b, e]]``: pruning,
    merging, pooling and un-merging are all of this form. Rows of the map need not sum to one.
    Differentiable in ``x`` and ``weight``, any number of times; deterministic; sums in fp32.

    Args:
        x: [B, N, D].
        num_slots: K.
        source: int64 [B, E], the token of each entry; None: entry e is token e (E = N).
        slot: int64 [B, E], the slot of each entry; None: entry e is slot e (E = K).
            -1 in either drops the entry; a slot without entries is zero.
        weight: [B, E]; None means ones.
        backend: see ``visprune.ops``.

    Returns:
        [B, K, D] in the dtype of ``x``.

    Raises:
        ConfigError: a wrong shape or dtype.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "reduce_tokens"
    if x.ndim != 3:
        raise ConfigError(f"{name}: x must be [B, N, D]; got {list(x.shape)}.")
    floating(name, x=x)
    if source is None and slot is None:
        raise ConfigError(f"{name}: give source or slot (or both) as int64 [B, E]; got neither.")
    entries = x.shape[1] if source is None else source.shape[-1]
    if slot is None and entries != num_slots:
        raise ConfigError(
            f"{name}: without slot, entry e is slot e, so num_slots must be {entries}; "
            f"got {num_slots}."
        )
    for key, t in (("source", source), ("slot", slot), ("weight", weight)):
        if t is not None and tuple(t.shape) != (x.shape[0], entries):
            raise ConfigError(
                f"{name}: {key} must be [B, E] = {[x.shape[0], entries]}; got {list(t.shape)}."
            )
        if t is not None and t.is_floating_point() != (key == "weight"):
            kind = "floating-point" if key == "weight" else "int64"
            raise ConfigError(f"{name}: {key} must be {kind}; got {t.dtype}.")
    choice = choose(name, backend, x.device, lambda: reduce_op.why_not(x, source, slot, weight))
    return reduce_op.reduce_tokens(x, source, slot, weight, num_slots, choice)


def gather_tokens(x: Tensor, index: Tensor, backend: str = "auto") -> Tensor:
    """Keep the tokens ``index`` int64 [B, K] of ``x`` [B, N, D] -> [B, K, D]; -1 gives zeros."""
    return reduce_tokens(x, index.shape[-1], source=index, backend=backend)


def merge_tokens(
    x: Tensor,
    dest: Tensor,
    num_slots: int,
    weight: Tensor | None = None,
    mean: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sum tokens into slots: ``y[b, s] = sum of weight[b, i] x[b, i] over i with dest = s``.

    Args:
        x: [B, N, D].
        dest: int64 [B, N], the slot of each token, -1 = dropped.
        num_slots: K.
        weight: [B, N], e.g. token sizes; None means ones.
        mean: divide by the slot's total weight (ToMe's size-weighted mean with sizes as
            weights); an empty slot stays zero.
        backend: see ``visprune.ops``.

    Returns:
        [B, K, D]. The new sizes are ``merge_tokens(size[..., None], dest, num_slots)[..., 0]``.

    Raises:
        ConfigError: a wrong shape or dtype.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    if not mean:
        return reduce_tokens(x, num_slots, slot=dest, weight=weight, backend=backend)
    total = x.new_ones(dest.shape).float() if weight is None else weight.float()
    total = reduce_tokens(total[..., None], num_slots, slot=dest, backend=backend)
    share = gather_tokens(total, dest, backend)[..., 0]  # [B, N], the total of the own slot
    share = (1.0 if weight is None else weight) / share.masked_fill(share == 0, 1)
    return reduce_tokens(x, num_slots, slot=dest, weight=share, backend=backend)


def unmerge_tokens(y: Tensor, dest: Tensor, backend: str = "auto") -> Tensor:
    """Give every token the value of its slot: ``y`` [B, K, D], ``dest`` [B, N] -> [B, N, D].

    Dropped tokens (-1) are zero.
    """
    return gather_tokens(y, dest, backend)


def bipartite_match(
    metric: Tensor,
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, int]:
    """ToMe's bipartite soft matching (arXiv 2210.09461): which r tokens merge, and into which.

    Even tokens propose to their most similar odd token by cosine; the ``r`` most similar pairs
    merge. At most half of the unprotected tokens go: ``r' = min(r, (T - protected) // 2)``.
    Slot order is the official one: kept even tokens (by position with a class token, else by
    falling similarity), then odd ones; with a distillation token even 0, odd 0, others. Ties
    keep the lower index (the official code leaves them to the sort).

    Args:
        metric: [B, T, C], e.g. keys averaged over heads.
        r: pairs to merge.
        class_token: token 0 is never merged away.
        distill_token: token 1 takes no others.
        backend: see ``visprune.ops``.

    Returns:
        ``dest`` int64 [B, T] for :func:`merge_tokens` / :func:`unmerge_tokens`, and the number
        of slots T - r'.

    Raises:
        BudgetError: negative ``r``.
        ConfigError: a wrong shape or dtype.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "bipartite_match"
    if metric.ndim != 3:
        raise ConfigError(f"{name}: metric must be [B, T, C]; got {list(metric.shape)}.")
    floating(name, metric=metric)
    if r < 0:
        raise BudgetError(f"{name}: r must be at least 0; got {r}.")
    count = metric.shape[1]
    r = max(0, min(r, (count - class_token - distill_token) // 2))
    choice = choose(name, backend, metric.device, lambda: reduce_op.why_not(metric))
    dest = reduce_op.bipartite_match(metric.detach(), r, class_token, distill_token, choice)
    return dest, count - r


# Numbers below which PyTorch adds rows one after the other on a CPU, by `index_put_`; `index_add_`
# sorts first, in seven parallel regions. Above, `index_put_` would add in no fixed order.
_SERIAL = 32768


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[B, K]`` of ``x`` ``[B, N, D]``: ``[B, K, D]``.

    Plain PyTorch, which compilers fuse and exporters know. By whole rows of the flattened batch:
    ``gather`` reads an index per element, and is three to ten times slower on a CPU.
    """
    batch, count, width = x.shape
    if batch == 1:
        return torch.embedding(x[0], index)
    return torch.embedding(x.reshape(batch * count, width), _flat(index, count))


def add_rows(out: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Add ``rows`` ``[B, R, D]`` to rows ``at`` ``[B, R]`` of ``out`` ``[B, K, D]``, in place."""
    batch, count, width = out.shape
    if out.device.type == "cpu" and batch == 1 and rows.numel() < _SERIAL and not _traced():
        out[0].index_put_((at[0],), rows[0], accumulate=True)
        return out
    at = at if batch == 1 else _flat(at, count)
    out.view(batch * count, width).index_add_(0, at.flatten(), rows.reshape(-1, width))
    return out


def _traced() -> bool:
    """Whether a compiler or an exporter looks on."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _flat(index: Tensor, count: int) -> Tensor:
    """Rows of a batch as rows of all its pictures, one after another."""
    return index + torch.arange(0, index.shape[0] * count, count, device=index.device)[:, None]
