# SPDX-License-Identifier: Apache-2.0
"""Exact selection of one image in O(N D) memory, computing only the cosines that decide.

Three facts make it exact without the N x N matrix, and cheaper than it:

* the largest cosine of a token to a *part* of the others is a lower bound of its largest cosine
  to all of them, so a token whose bound already loses need not be looked at further;
* only the columns of *kept* tokens enter any objective, and the next few picks are nearly always
  among the tokens that lead now, so their columns are computed together, ahead of need, by one
  matrix product (k products with single vectors would read ``x`` k times);
* a speculated column that is not picked is only lost work, never a wrong answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

AHEAD = 24  # columns computed together; more wastes products, fewer wastes bandwidth
BLOCK = 256  # tokens compared at once in the search for the most isolated one


def inverse_norms(x: Tensor) -> Tensor:
    """1 / length of every row, 0 for a row of zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return torch.where(norm > 0, 1 / norm, 0.0)


def mean_pivot(x: Tensor, inv: Tensor) -> int:
    """The token with the smallest cosine to the mean of the unit vectors."""
    return int((torch.mv(x, torch.mv(x.T, inv)) * inv).argmin())


def isolated_token(x: Tensor, inv: Tensor, block: int = BLOCK) -> int:
    """The token whose nearest neighbour is farthest; ties keep the lower index.

    Blocks of tokens are compared with every token still alive. The first block sees all tokens,
    so its best one is a valid candidate; who already has a nearer neighbour than that leaves.
    """
    n = len(x)
    near = torch.full((n,), -torch.inf, dtype=x.dtype)  # lower bound of the largest cosine
    alive, compared, xs = torch.arange(n), torch.zeros(n, dtype=torch.bool), x
    best, pick = torch.inf, -1
    while len(alive):
        waiting = (~compared[alive]).nonzero()[:, 0]
        if pick >= 0 and (len(waiting) == 0 or len(alive) <= block):
            return _settle(x, inv, alive, near, best, pick)
        if pick < 0:  # spread over the picture: neighbours resemble each other
            part = waiting[:: max(1, n // block)]
        else:
            part = waiting[near[alive[waiting]].argsort(stable=True)[:block]]
        tokens = alive[part]
        compared[tokens] = True
        cos = _cosines(xs[part], xs, inv[tokens], inv[alive], part)
        near[alive] = torch.maximum(near[alive], cos.amax(0))
        near[tokens] = torch.maximum(near[tokens], cos.amax(1))
        if pick < 0:
            best, pick = _lowest(near, tokens, best, pick)
        stay = _contenders(near, alive, best, pick)
        alive, xs = alive[stay], xs[stay]
    return pick


def _cosines(a: Tensor, b: Tensor, inv_a: Tensor, inv_b: Tensor, self_at: Tensor) -> Tensor:
    """[len(a), len(b)] cosines; the entry of a row with itself (``self_at``) is -inf."""
    cos = (a @ b.T).mul_(inv_b).mul_(inv_a[:, None])
    cos[torch.arange(len(a)), self_at] = -torch.inf
    return cos


def _lowest(near: Tensor, tokens: Tensor, best: float, pick: int) -> tuple[float, int]:
    """The better of the candidate and ``tokens`` (whose values are final)."""
    value = float(near[tokens].min())
    index = int(tokens[near[tokens] == value].min())
    better = value < best or (value == best and index < pick)
    return (value, index) if better else (best, pick)


def _contenders(near: Tensor, alive: Tensor, best: float, pick: int) -> Tensor:
    """Positions in ``alive`` of tokens that may still beat the candidate."""
    bound = near[alive]
    return ((bound < best) | ((bound == best) & (alive < pick))).nonzero()[:, 0]


def _settle(x: Tensor, inv: Tensor, alive: Tensor, near: Tensor, best: float, pick: int) -> int:
    """Compare the last contenders with all tokens, most promising first."""
    step = 16
    while len(alive):
        tokens = alive[near[alive].argsort(stable=True)[:step]]
        cos = _cosines(x[tokens], x, inv[tokens], inv, tokens)
        near[tokens] = cos.amax(1)
        best, pick = _lowest(near, tokens, best, pick)
        alive = alive[~torch.isin(alive, tokens)]
        alive = alive[_contenders(near, alive, best, pick)]
        step *= 2
    return pick


def k_center(x: Tensor, inv: Tensor, k: int, pivot: int) -> Tensor:
    """Farthest-first from ``pivot`` -> int64 [k].

    ``near[v]`` is the largest cosine of v to the first ``seen[v]`` kept tokens: it only grows,
    so a stale value is a lower bound. An epoch brings the tokens with the lowest bounds up to
    date and picks among them until one outside might win.
    """
    n, dim = x.shape
    order = torch.empty(k, dtype=torch.long)
    kept = torch.empty(k, dim, dtype=x.dtype)  # unit rows of the kept tokens
    order[0], kept[0] = pivot, x[pivot] * inv[pivot]
    near = torch.mv(x, kept[0]) * inv
    near[pivot] = torch.inf
    seen = torch.ones(n, dtype=torch.long)
    done, size = 1, max(128, n // 6)
    while done < k:
        rank = near.argsort(stable=True)
        pool = rank[:size].sort().values
        outside = int(rank[size]) if size < n else -1
        rows = x[pool] * inv[pool, None]
        bound = _catch_up(rows, near[pool], seen[pool], kept, done)
        rival = (float(near[outside]), outside) if outside >= 0 else (torch.inf, n)
        before = done
        done = _epoch(rows, pool, bound, rival, order, kept, done, k)
        near[pool], seen[pool] = bound, done
        size = max(128, n // 6) if done > before else 2 * size
    return order


def _catch_up(rows: Tensor, bound: Tensor, seen: Tensor, kept: Tensor, done: int) -> Tensor:
    """Largest cosine of ``rows`` to all ``done`` kept tokens, from their stale bounds."""
    for start in seen.unique().tolist():
        if start < done:
            at = (seen == start).nonzero()[:, 0]
            fresh = (rows[at] @ kept[start:done].T).amax(1)
            bound[at] = torch.maximum(bound[at], fresh)
    return bound


def _epoch(
    rows: Tensor,
    pool: Tensor,
    bound: Tensor,
    rival: tuple[float, int],
    order: Tensor,
    kept: Tensor,
    done: int,
    k: int,
) -> int:
    """Pick from the pool while its best certainly beats ``rival`` (bound, index) outside."""
    column: dict[int, Tensor] = {}
    while done < k:
        best = int(bound.argmin())
        value, index = float(bound[best]), int(pool[best])
        if (value, index) >= rival:
            return done
        order[done], kept[done] = index, rows[best]
        done += 1
        if done < k:
            if best not in column:
                column = _ahead(rows, bound, best, min(AHEAD, k - done))
            torch.maximum(bound, column[best], out=bound)
        bound[best] = torch.inf
    return done


def _ahead(rows: Tensor, score: Tensor, pick: int, count: int) -> dict[int, Tensor]:
    """Cosine columns of the pick and of the next ``count`` leaders (lowest score)."""
    leaders = score.topk(min(count + 1, len(score)), largest=False).indices
    leaders[-1] = torch.where((leaders == pick).any(), leaders[-1], pick)
    return dict(zip(leaders.tolist(), rows[leaders] @ rows.T, strict=True))


def max_sum(x: Tensor, inv: Tensor, k: int, pivot: int) -> Tensor:
    """Smallest sum of cosines to the kept tokens, from ``pivot`` -> int64 [k]."""
    order = torch.empty(k, dtype=torch.long)
    total, pick = torch.zeros(len(x), dtype=x.dtype), pivot
    column: dict[int, Tensor] = {}
    for i in range(k):
        order[i] = pick
        if i + 1 == k:
            break
        if pick not in column:
            column = _columns(x, inv, total, pick, min(AHEAD, k - i - 1) if i else 0)
        total += column[pick]
        total[pick] = torch.inf
        pick = int(total.argmin())
    return order


def dpp(x: Tensor, inv: Tensor, k: int, pivot: int, rel: Tensor) -> Tensor:
    """Greedy MAP of the kernel ``r_u cos r_v`` from ``pivot`` -> int64 [k]."""
    n = len(x)
    order = torch.empty(k, dtype=torch.long)
    chol = torch.empty(k, n, dtype=x.dtype)
    residual = torch.where(inv > 0, rel.square(), 0.0)  # the diagonal of the kernel
    pick, column = pivot, {}
    for i in range(k):
        order[i] = pick
        if i + 1 == k:
            break
        if pick not in column:
            column = _columns(x, inv, -residual, pick, min(AHEAD, k - i - 1) if i else 0)
        var = float(residual[pick])
        torch.mul(column[pick], rel, out=chol[i]).mul_(rel[pick])
        chol[i] -= torch.mv(chol[:i].T, chol[:i, pick])
        chol[i] *= var**-0.5 if var > 0 else 0.0
        residual -= chol[i].square()
        residual[pick] = -torch.inf
        pick = int(residual.argmax())
    return order


def _columns(x: Tensor, inv: Tensor, score: Tensor, pick: int, count: int) -> dict[int, Tensor]:
    """Cosines of every token to the pick and to the next ``count`` leaders (lowest score)."""
    leaders = score.topk(min(count + 1, len(score)), largest=False).indices
    leaders[-1] = torch.where((leaders == pick).any(), leaders[-1], pick)
    cos = ((x[leaders] * inv[leaders, None]) @ x.T).mul_(inv)
    return dict(zip(leaders.tolist(), cos, strict=True))
