# SPDX-License-Identifier: Apache-2.0
"""Clusters by density (see ``visprune.ops``): plain PyTorch, batched, exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visprune.errors import BudgetError, ConfigError
from visprune.ops.check import floating

_STRIP = 256  # rows


def dpc_knn(x: Tensor, clusters: int, neighbors: int) -> tuple[Tensor, Tensor]:
    """Density peaks by nearest neighbours (DPC-KNN, as token reduction uses it).

    Distances are Euclidean over ``sqrt(D)``. A token's density is ``exp(-mean d^2)`` over its
    ``neighbors`` nearest tokens, itself among them; its separation the distance to the nearest
    token of higher density (of the densest: the largest distance there is). Centres are those of
    largest product; every token goes to the nearest centre, a centre to itself. Ties: the lower
    index.

    Args:
        x: ``[B, N, D]``.
        clusters: how many, in 1..N.
        neighbors: k, cut to N.

    Returns:
        Centres ``[B, C]`` by falling product, and the cluster of each token ``[B, N]``, int64.

    Raises:
        BudgetError: ``clusters`` out of range.
        ConfigError: a wrong shape or dtype.
    """
    count = _checked("dpc_knn", x, clusters)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dist = distances(wide) / x.shape[2] ** 0.5
    near = dist.topk(min(max(1, neighbors), count), dim=-1, largest=False).values
    density = (-near.square().mean(-1)).exp()
    higher = density[:, None, :] > density[..., None]
    top = dist.flatten(1).amax(1)[:, None, None]
    separation = torch.where(higher, dist, top).amin(-1)
    order = (separation * density).argsort(dim=1, descending=True, stable=True)
    centers = order[:, :clusters]
    own = dist.gather(1, centers[..., None].expand(-1, -1, count)).min(1).indices
    ranks = torch.arange(clusters, device=x.device).expand_as(centers)
    return centers, own.scatter(1, centers, ranks)


def distances(x: Tensor) -> Tensor:
    """Euclidean distances of all rows ``[B, N, D]``, ``[B, N, N]``; 0 between equal ones.

    On the CPU from products in float64, a tenth of the time of summing up differences: what is left
    of them in float32 is the same, but rows that differ by less than a millionth are equal. The
    upper half is computed, strip by strip, and mirrored.
    """
    if x.device.type != "cpu":
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    double = x.double()
    norm = double.square().sum(-1)

    def strip(rows: slice, right: slice) -> Tensor:
        return _apart(double[:, rows], double[:, right], norm[:, rows], norm[:, right])

    return _mirrored(x, strip)


def distances_to(x: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances of rows ``[B, R, D]`` to others ``[B, K, D]``, ``[B, R, K]``.

    Computed as those of :func:`distances`, and as exact; in float32 at least.

    Raises:
        ConfigError: a wrong shape or dtype.
    """
    floating("distances_to", x=x, others=others)
    if x.ndim != 3 or others.ndim != 3 or x.shape[::2] != others.shape[::2]:
        raise ConfigError(
            f"distances_to: x is [B, R, D] and others [B, K, D]; got {list(x.shape)} and "
            f"{list(others.shape)}."
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        return torch.cdist(
            x.to(dtype), others.to(dtype), compute_mode="donot_use_mm_for_euclid_dist"
        )
    a, b = x.double(), others.double()
    return _apart(a, b, a.square().sum(-1), b.square().sum(-1)).to(dtype)


def _apart(x: Tensor, others: Tensor, norm: Tensor, its: Tensor) -> Tensor:
    """Distances of rows ``[B, R, D]`` and ``[B, K, D]`` by products, of their squared norms."""
    both = norm[:, :, None] + its[:, None]
    squared = torch.baddbmm(both, x, others.transpose(1, 2), alpha=-2.0)
    return squared.masked_fill_(squared <= 1e-12 * both, 0.0).sqrt_()


def gram(x: Tensor) -> Tensor:
    """Products of all rows ``[B, N, D]``, ``[B, N, N]``; on the CPU the same both ways, to the bit.

    There the upper half is computed, strip by strip, and mirrored.
    """
    if x.device.type != "cpu":
        return x @ x.transpose(1, 2)
    return _mirrored(x, lambda rows, right: x[:, rows] @ x[:, right].transpose(1, 2))


def _mirrored(x: Tensor, strip: Callable[[slice, slice], Tensor]) -> Tensor:
    """What ``strip`` says of rows and the columns from them on, and the same below the diagonal."""
    count = x.shape[1]
    out = x.new_empty(len(x), count, count)
    for start in range(0, count, _STRIP):
        rows, right = slice(start, start + _STRIP), slice(start, None)
        part = strip(rows, right).to(x.dtype)
        own = part[..., : part.shape[1]]
        part[..., : part.shape[1]] = own.triu() + own.triu(1).transpose(1, 2)
        out[:, rows, right] = part
        out[:, right, rows] = part.transpose(1, 2)
    return out


def separated(dist: Tensor, density: Tensor, cutoff: float) -> Tensor:
    """Visit tokens by falling density; one is a centre that is farther than ``cutoff`` from all.

    The same set as one token after another, by rounds: a token is settled once every denser one
    within the cutoff is.

    Args:
        dist: ``[B, N, N]``, symmetric.
        density: ``[B, N]``; ties go to the lower index.
        cutoff: of the distance.

    Returns:
        Centres, bool ``[B, N]``.
    """
    rank = density.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    before = (rank[:, None, :] < rank[..., None]) & (dist <= cutoff)  # [B, i, j]: j is denser, near
    center = torch.zeros(density.shape, dtype=torch.bool, device=dist.device)
    covered = center.clone()
    while not bool((center | covered).all()):
        left = ~(center | covered)
        waits = (before & left[:, None, :]).any(-1)
        center = center | (left & ~waits)
        covered = covered | (left & (before & center[:, None, :]).any(-1))
    return center


def _checked(name: str, x: Tensor, clusters: int) -> int:
    if x.ndim != 3:
        raise ConfigError(f"{name}: x must be [B, N, D]; got {list(x.shape)}.")
    floating(name, x=x)
    if not 1 <= clusters <= x.shape[1]:
        raise BudgetError(f"{name}: clusters must be in 1..{x.shape[1]}; got {clusters}.")
    return x.shape[1]
