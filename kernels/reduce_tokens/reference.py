# SPDX-License-Identifier: Apache-2.0
"""The truth for token reduction and ToMe's matching, as explicit loops and matrices.

A reduction is a list of entries e = (source, slot, weight) per image:

    y[b, s] = sum over e with slot[b, e] = s of weight[b, e] * x[b, source[b, e]]

It is the product with a weighted [slots, tokens] matrix that is never written. Gathering,
dropping, merging, pooling and un-merging are all of this form, and so is the gradient: sources
and slots change places. An entry with -1 on either side does nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def map_matrix(
    n: int, num_slots: int, source: Tensor | None, slot: Tensor | None, weight: Tensor
) -> Tensor:
    """The [B, num_slots, n] matrix of the entries, one by one. All tensors are [B, E]."""
    given = next(t for t in (source, slot) if t is not None)
    batch, entries = given.shape
    out = weight.new_zeros(batch, num_slots, n)
    for b in range(batch):
        for e in range(entries):
            i = e if source is None else int(source[b, e])
            s = e if slot is None else int(slot[b, e])
            if i >= 0 and s >= 0:
                out[b, s, i] += weight[b, e]
    return out


def reduce_tokens(
    x: Tensor,
    source: Tensor | None,
    slot: Tensor | None,
    weight: Tensor | None,
    num_slots: int,
) -> Tensor:
    """``x`` [B, N, D] -> [B, num_slots, D]."""
    given = next(t for t in (source, slot) if t is not None)
    weight = x.new_ones(given.shape) if weight is None else weight.to(x.dtype)
    return map_matrix(x.shape[1], num_slots, source, slot, weight) @ x


def bipartite_match(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> Tensor:
    """ToMe (arXiv 2210.09461): the output slot of each of T tokens -> int64 [B, T].

    Even tokens propose to their most similar odd token; the ``r`` best proposals merge (at most
    half of the unprotected tokens). Slots: remaining even tokens, then odd ones; the even ones by
    position if there is a class token, else by falling similarity; with a distillation token the
    order is even 0, odd 0, other even, other odd. Ties keep the lower index.
    """
    out = []
    for m in metric:
        m = m / m.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)
        count = len(m)
        r_now = min(r, (count - class_token - distill_token) // 2)
        if r_now <= 0:
            out.append(torch.arange(count))
            continue
        even, odd = list(range(0, count, 2)), list(range(1, count, 2))
        best: dict[int, tuple[float, int]] = {}
        for i in even:
            allowed = [j for j in odd if not (distill_token and j == 1)]
            score = {j: float(m[i] @ m[j]) for j in allowed}
            top = max(allowed, key=lambda j: (score[j], -j))
            best[i] = (-torch.inf, top) if class_token and i == 0 else (score[top], top)
        ranked = sorted(even, key=lambda i: (-best[i][0], i))
        merged, rest = ranked[:r_now], ranked[r_now:]
        rest = sorted(rest) if class_token else rest
        layout = [rest[0], 1, *rest[1:], *odd[1:]] if distill_token else [*rest, *odd]
        place = {token: slot for slot, token in enumerate(layout)}
        for i in merged:
            place[i] = place[best[i][1]]
        out.append(torch.tensor([place[t] for t in range(count)]))
    return torch.stack(out)
