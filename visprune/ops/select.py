# SPDX-License-Identifier: Apache-2.0
"""Diverse selection (see ``visprune.ops``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import BudgetError, ConfigError
from visprune.kernels.greedy_diverse import op as greedy_op
from visprune.ops.check import choose, floating, one_of, shape


def greedy_diverse(
    x: Tensor,
    num_keep: int | Tensor,
    objective: str = "k_center",
    pivot: int | str | Tensor | None = None,
    relevance: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pick diverse tokens greedily by cosine similarity; exact, deterministic, no duplicates.

    Objectives: ``"k_center"`` picks the token farthest from its nearest kept one (max-min:
    DivPrune, CVPR 2025; ToDRE v1), ``"max_sum"`` the one with the smallest sum of cosines to
    the kept ones (ToDRE, arXiv 2505.18757 v2, Alg. 1), ``"dpp"`` greedy MAP of the kernel
    ``r_u cos(u, v) r_v`` (CDPruner, NeurIPS 2025). Ties keep the lower index. Half types are
    computed in fp32. Unlike the official DivPrune, kept tokens are masked out, so equal tokens
    never return an index twice; a token of zeros has cosine 0 with everything (not NaN).

    Args:
        x: [N, D] or [B, N, D] features, any length: they are compared by direction.
        num_keep: tokens to keep, or an int64 tensor [B] with one number per row.
        objective: see above.
        pivot: the first token: an index, an int64 tensor [B], ``"farthest_neighbor"`` (the
            token whose nearest neighbour is farthest: DivPrune's first pick), or None: for dpp
            the token of largest relevance, else the one farthest in direction from the mean
            of the unit vectors (a stated choice; the papers leave it open or take CLS
            attention, which the caller passes as an index).
        relevance: non-negative [N] or [B, N], for ``dpp`` only; None means ones.
        mask: bool [N] or [B, N], True = may be kept. A row with fewer such tokens than
            ``num_keep`` keeps them all.
        backend: see the module.

    Returns:
        int64 [k] or [B, k] in selection order; -1 after the end of a row that keeps fewer
        (``num_keep`` as a tensor: k is its maximum).

    Raises:
        BudgetError: ``num_keep`` negative or above N.
        ConfigError: a wrong shape, dtype, name or pivot.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "greedy_diverse"
    one_of(f"{name}: objective", objective, ("k_center", "max_sum", "dpp"))
    if x.ndim not in (2, 3):
        raise ConfigError(f"{name}: x must be [N, D] or [B, N, D]; got {list(x.shape)}.")
    floating(name, x=x)
    if relevance is not None and objective != "dpp":
        raise ConfigError(f"{name}: relevance is used by objective='dpp' only; got {objective!r}.")
    single = x.ndim == 2
    if single:
        x = x[None]
        relevance = relevance if relevance is None else relevance[None]
        mask = mask if mask is None else mask[None]
    shape(name, "relevance", relevance, tuple(x.shape[:2]))
    shape(name, "mask", mask, tuple(x.shape[:2]))
    keep, width = _budget(name, num_keep, x)
    rule, first = _pivot(name, pivot, x, mask, objective)
    mask = None if mask is None else mask.bool()
    choice = choose(name, backend, x.device, lambda: greedy_op.why_not(x))
    args = (x.detach(), keep, width, objective, rule, first, relevance, mask, choice)
    out = greedy_op.greedy_diverse(*args)
    return out[0] if single else out


def _budget(name: str, num_keep: int | Tensor, x: Tensor) -> tuple[Tensor | None, int]:
    """(per-row budgets or None, number of columns to return)."""
    n = x.shape[1]
    keep = None
    if isinstance(num_keep, Tensor):
        if num_keep.ndim != 1 or len(num_keep) != len(x) or num_keep.is_floating_point():
            raise BudgetError(
                f"{name}: num_keep must be an int or an int64 tensor [{len(x)}]; "
                f"got {num_keep.dtype} {list(num_keep.shape)}."
            )
        keep = num_keep.to(x.device)
        width = int(num_keep.max()) if len(num_keep) else 0
        low = int(num_keep.min()) if len(num_keep) else 0
    elif not hasattr(num_keep, "__index__"):
        raise BudgetError(
            f"{name}: num_keep must be an int or an int64 tensor [{len(x)}]; got {num_keep!r}."
        )
    else:
        width = low = num_keep
    if low < 0 or width > n:
        got = f"{low}..{width}" if keep is not None else width
        raise BudgetError(f"{name}: num_keep must be in 0..{n} (the tokens given); got {got}.")
    return keep, width


def _pivot(
    name: str, pivot: int | str | Tensor | None, x: Tensor, mask: Tensor | None, objective: str
) -> tuple[str, Tensor | None]:
    """(rule of the first pick, given first picks [B] or None)."""
    if pivot is None:
        return ("relevance" if objective == "dpp" else "mean"), None
    if isinstance(pivot, str):
        one_of(f"{name}: pivot", pivot, ("farthest_neighbor",))
        return pivot, None
    batch, n = x.shape[:2]
    if isinstance(pivot, Tensor):
        if pivot.numel() not in (1, batch) or pivot.is_floating_point():
            raise ConfigError(
                f"{name}: pivot must be an index or an int64 tensor [{batch}]; "
                f"got {pivot.dtype} {list(pivot.shape)}."
            )
        first = pivot.reshape(-1).to(x.device, torch.long).expand(batch)
    else:
        first = torch.full((batch,), pivot, dtype=torch.long, device=x.device)
    # Reading the values waits for the device and breaks a compiled graph: only where it is free.
    if n and x.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool(((first < 0) | (first >= n)).any()):
            raise ConfigError(f"{name}: pivot must be in 0..{n - 1}; got {first.tolist()}.")
        if mask is not None and not bool(mask.gather(1, first[:, None]).all()):
            raise ConfigError(f"{name}: pivot {first.tolist()} is masked out; give a kept one.")
    return "given", first
