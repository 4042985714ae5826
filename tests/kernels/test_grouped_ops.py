# SPDX-License-Identifier: Apache-2.0
"""Ranks and shares of groups, and greedy coverage, against the rules written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visprune import ops
from visprune.errors import BudgetError, ConfigError


def test_ranks_within_groups() -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 5, (4, 40)).float()  # with ties
    group = torch.randint(0, 6, (4, 40))
    rank = ops.rank_within(score, group)
    for b in range(4):
        for own in range(6):
            members = (group[b] == own).nonzero()[:, 0].tolist()
            order = sorted(members, key=lambda n: (-float(score[b, n]), n))
            assert [int(rank[b, n]) for n in order] == list(range(len(order)))
    with pytest.raises(ConfigError, match=r"\[B, N\] alike; got \[4, 40\] and \[4, 39\]"):
        ops.rank_within(score, group[:, 1:])


@pytest.mark.parametrize("total", [0, 1, 17, 39, 40])
def test_shares_add_up_and_fit(total: int) -> None:
    torch.manual_seed(1)
    group = torch.randint(0, 6, (5, 40))
    quota = ops.shares(group, total)
    size = torch.stack([(group == own).sum(1) for own in range(quota.shape[1])], dim=1)
    assert quota.sum(1).tolist() == [total] * 5
    assert bool((quota <= size).all())
    assert bool((quota >= size * total // 40).all())
    with pytest.raises(ConfigError, match=r"total must be in 0\.\.40; got 41"):
        ops.shares(group, 41)


def written_out(x: Tensor, weight: Tensor, keep: int) -> list[int]:
    """Every gain anew in every step."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    cosine = unit @ unit.T
    covered, picked = torch.zeros(len(x)), []
    for _ in range(keep):
        gain = weight * (cosine - covered).clamp(min=0.0).sum(1)
        gain[picked] = float("-inf")
        picked.append(int(gain.argmax()))
        covered = torch.maximum(covered, cosine[picked[-1]])
    return picked


@pytest.mark.parametrize(("count", "keep"), [(1, 1), (40, 40), (150, 30), (300, 12)])
@pytest.mark.parametrize("kind", ["random", "clustered", "repeated", "constant"])
def test_greedy_coverage_is_that_of_every_gain_anew(count: int, keep: int, kind: str) -> None:
    torch.manual_seed(count)
    x = torch.randn(2, count, 12)
    if kind == "clustered":
        x = x * 0.2 + torch.randn(2, 5, 12)[:, torch.arange(count) % 5]
    elif kind == "repeated":
        x = x[:, torch.arange(count) // 3]
    elif kind == "constant":
        x = x[:, :1].expand(-1, count, -1)
    weight = torch.rand(2, count) if kind != "constant" else torch.ones(2, count)
    index = ops.greedy_coverage(x, weight, keep)
    assert index.tolist() == [written_out(x[b], weight[b], keep) for b in range(2)]
    assert torch.equal(ops.greedy_coverage(x[1:], weight[1:], keep), index[1:])


def test_greedy_coverage_refuses_nonsense() -> None:
    x, weight = torch.randn(2, 5, 4), torch.rand(2, 5)
    with pytest.raises(BudgetError, match=r"num_keep must be in 0\.\.5; got 6"):
        ops.greedy_coverage(x, weight, 6)
    with pytest.raises(ConfigError, match=r"x must be \[B, N, D\]; got \[5, 4\]"):
        ops.greedy_coverage(x[0], weight[0], 2)
    with pytest.raises(ConfigError, match=r"weight must have shape \[2, 5\]; got \[2, 4\]"):
        ops.greedy_coverage(x, weight[:, :4], 2)
    assert ops.greedy_coverage(x[:0], weight[:0], 3).shape == (0, 3)
