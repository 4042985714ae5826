# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of token reduction and of ToMe's matching (rules: ``reference.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.kernels.common.precision import wide


def pick_rows(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows of ``x`` [B, N, D] at ``index`` [B, E]; zeros where it is -1."""
    if index is None:
        return x
    if x.shape[1] == 0:
        return x.new_zeros(*index.shape, x.shape[2])
    rows = x.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, x.shape[2]))
    return rows.masked_fill_((index < 0)[..., None], 0)


def reduce_tokens(
    x: Tensor, source: Tensor | None, slot: Tensor | None, weight: Tensor | None, num_slots: int
) -> Tensor:
    """``x`` [B, N, D] -> [B, num_slots, D] in the dtype of ``x``; sums in fp32."""
    rows = pick_rows(x, source)  # [B, E, D]
    if slot is None:
        out = rows if weight is None else wide(rows) * weight[..., None].to(wide(rows).dtype)
        out = out.to(x.dtype)
        return out.clone() if out is x else out
    rows = wide(rows)
    if rows.device.type != "cpu":
        return _by_matrix(rows, slot, weight, num_slots).to(x.dtype)
    if weight is not None:
        rows = rows * weight[..., None].to(rows.dtype)
    batch, _, dim = rows.shape
    # One row more per image takes what is dropped; index_add_ adds in order on the CPU.
    bins = num_slots + 1
    at = torch.where(slot < 0, num_slots, slot) + bins * torch.arange(batch)[:, None]
    out = rows.new_zeros(batch * bins, dim)
    out.index_add_(0, at.flatten(), rows.flatten(0, 1))
    return out.view(batch, bins, dim)[:, :num_slots].to(x.dtype).contiguous()


def _by_matrix(rows: Tensor, slot: Tensor, weight: Tensor | None, num_slots: int) -> Tensor:
    """By an explicit [B, slots, E] matrix: scatters with atomics differ from run to run.

    A token that is not finite spoils its whole image here (0 * inf), unless it is dropped.
    """
    rows = rows.masked_fill((slot < 0)[..., None], 0)
    hit = slot[:, None, :] == torch.arange(num_slots, device=slot.device)[:, None]
    matrix = hit.to(rows.dtype)
    if weight is not None:
        matrix = matrix * weight[:, None, :].to(rows.dtype)
    return matrix @ rows


def alternate_cosines(metric: Tensor, shift: int = 0) -> Tensor:
    """Cosine of every other token, from ``shift`` on, to each of the rest -> [B, evens, odds].

    A token of length zero is as far from all: its cosines are 0, which dividing by its length would
    not give.
    """
    metric = wide(metric)
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    unit = metric / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    # Not `@`, which copies every other row first.
    return torch.bmm(unit[:, shift::2], unit[:, 1 - shift :: 2].transpose(1, 2))


def best_partners(metric: Tensor, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    """For each even token its best cosine to an odd token, and that partner -> [B, ceil(T/2)]."""
    scores = alternate_cosines(metric)
    if distill_token:
        scores[..., 0] = -torch.inf
    if class_token:
        scores[:, 0] = -torch.inf
    partner = scores.argmax(-1)
    return scores.gather(2, partner[..., None])[..., 0], partner


def slots_from_partners(
    value: Tensor, partner: Tensor, count: int, r: int, class_token: bool, distill_token: bool
) -> Tensor:
    """Merge the ``r`` best even tokens into their partners -> slot of every token [B, count]."""
    ranked = value.argsort(dim=1, descending=True, stable=True)  # [B, even]
    merged, rest = ranked[:, :r], ranked[:, r:]
    if class_token:
        rest = rest.sort(dim=1).values
    odd = torch.arange(count // 2, device=value.device)
    place_rest = torch.arange(rest.shape[1], device=value.device)
    place_odd = odd + rest.shape[1]
    if distill_token:  # even 0, odd 0, other even, other odd
        place_rest = place_rest + (place_rest > 0)
        place_odd = torch.where(odd == 0, 1, place_odd)
    dest = partner.new_empty(len(value), count)
    dest[:, 1::2] = place_odd
    even = dest[:, ::2]
    even.scatter_(1, rest, place_rest.expand(len(value), -1))
    even.scatter_(1, merged, place_odd[partner.gather(1, merged)])
    return dest
