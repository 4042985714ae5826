# SPDX-License-Identifier: Apache-2.0
"""Clusters by density against their rules, one token after another."""

from __future__ import annotations

import pytest
import torch

from visprune import ops
from visprune.errors import BudgetError, ConfigError
from visprune.ops.cluster import distances, distances_to


@pytest.mark.parametrize("cutoff", [0.0, 0.3, 0.8, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_centres_are_those_of_the_rule_in_turn(cutoff: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(2, 40, 5, generator=generator), dim=-1)
    x[:, 7] = x[:, 3]  # a tie
    dist = (1 - x @ x.transpose(1, 2)).clamp(min=0)
    dist.diagonal(dim1=1, dim2=2).zero_()
    density = (-dist).exp().sum(-1)
    found = ops.separated(dist, density, cutoff)
    for row in range(2):
        centers: list[int] = []
        for at in density[row].argsort(descending=True, stable=True).tolist():
            if all(float(dist[row, at, c]) > cutoff for c in centers):
                centers.append(at)
        assert found[row].nonzero()[:, 0].tolist() == sorted(centers)


def test_density_peaks_of_tight_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    label = torch.arange(3).repeat(8)
    x = places[label] + 0.1 * torch.randn(24, 2, generator=generator)
    centers, found = ops.dpc_knn(x[None], 3, 4)
    assert sorted(label[centers[0]].tolist()) == [0, 1, 2]
    assert torch.equal(label[centers[0]][found[0]], label)
    assert found[0, centers[0]].tolist() == [0, 1, 2]  # a centre is in its own cluster


def test_a_constant_picture_and_one_token() -> None:
    centers, label = ops.dpc_knn(torch.ones(2, 6, 3), 2, 2)
    assert centers.tolist() == [[0, 1]] * 2  # ties: the lower index
    assert label.tolist() == [[0, 1, 0, 0, 0, 0]] * 2
    assert ops.dpc_knn(torch.ones(1, 1, 3), 1, 5)[1].tolist() == [[0]]
    one = ops.separated(torch.zeros(1, 6, 6), torch.ones(1, 6), 0.5)
    assert one.tolist() == [[True, False, False, False, False, False]]


def test_what_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"clusters must be in 1..6; got 7"):
        ops.dpc_knn(torch.ones(1, 6, 3), 7, 2)
    with pytest.raises(ConfigError, match=r"x must be \[B, N, D\]"):
        ops.dpc_knn(torch.ones(6, 3), 1, 2)
    with pytest.raises(ConfigError, match="floating-point"):
        ops.dpc_knn(torch.ones(1, 6, 3, dtype=torch.int64), 1, 2)


@pytest.mark.parametrize("count", [1, 255, 600])
def test_products_and_distances_are_the_same_both_ways(count: int) -> None:
    x = torch.randn(2, count, 24, generator=torch.Generator().manual_seed(5))
    found = ops.gram(x)
    torch.testing.assert_close(found, x @ x.mT, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.mT)
    apart = distances(x)
    assert torch.equal(apart, apart.mT)
    wide = x.double()
    want = (wide[:, :, None] - wide[:, None]).square().sum(-1).sqrt()
    torch.testing.assert_close(apart.double(), want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_those_of_the_differences(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 50, 96, generator=generator, dtype=dtype)
    x[1] += 30.0  # far from the origin, where products cancel
    x[:, 11] = x[:, 4]
    found = distances(x)
    wide = x.double()
    want = (wide[:, :, None] - wide[:, None]).square().sum(-1).sqrt()
    torch.testing.assert_close(found.double(), want, rtol=2e-7, atol=0)
    assert found.dtype == dtype
    assert found[:, 11, 4].tolist() == found[0].diagonal()[:2].tolist() == [0.0, 0.0]


def test_distances_to_others() -> None:
    x, others = torch.randn(2, 7, 5), torch.randn(2, 4, 5)
    others[:, 1] = x[:, 3]
    want = torch.cdist(x.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
    got = distances_to(x, others)
    torch.testing.assert_close(got, want.float())
    assert got[:, 3, 1].tolist() == [0.0, 0.0]
    assert distances_to(x[:, :0], others).shape == (2, 0, 4)
    assert distances_to(x.bfloat16(), others.bfloat16()).dtype == torch.float32
    with pytest.raises(ConfigError, match=r"others .B, K, D.; got .2, 7, 5. and .2, 4, 4."):
        distances_to(x, others[..., :4])
