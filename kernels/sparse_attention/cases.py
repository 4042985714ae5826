# SPDX-License-Identifier: Apache-2.0
"""Named inputs of the sparse operators for the shared test and the bench."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.kernels.common.spec import Case, Inputs

from . import op, reference

# Tokens: DeiT-S at 224, 384, 672 and 896 pixels (6 heads of 64), each with these keys a query.
BENCH_TOKENS = (197, 577, 1765, 3137)
BENCH_KEYS = (8, 16, 32, 64, 128)


def some_keys(shape: tuple[int, int, int], keys: int, width: int, gen: torch.Generator) -> Tensor:
    """``width`` different keys per row, rising: [B, H, N, width]."""
    noise = torch.rand(*shape, keys, generator=gen)
    return noise.topk(width, -1).indices.sort(-1).values


def _index(
    name: str,
    shape: tuple[int, int, int, int],
    keys: int,
    width: int,
    dim_v: int | None = None,
    missing: bool = False,
    twice: bool = False,
) -> Case:
    """``shape``: B, H, N, d. ``missing``: entries of -1, and one query without any key."""

    def make(gen: torch.Generator) -> Inputs:
        b, h, n, d = shape
        idx = some_keys((b, h, n), keys, width, gen)
        if missing:
            idx = idx.masked_fill(torch.rand(idx.shape, generator=gen) < 0.4, -1)
            idx[:, :, -1] = -1
        if twice:
            idx[..., 0] = idx[..., 1]
        return {
            "q": torch.randn(b, h, n, d, generator=gen),
            "k": torch.randn(b, h, keys, d, generator=gen),
            "v": torch.randn(b, h, keys, dim_v or d, generator=gen),
            "idx": idx,
            "scale": d**-0.5,
        }

    return Case(name, op.sparse_attention, reference.sparse_attention, make, ("q", "k", "v"))


def _blocks(
    name: str,
    shape: tuple[int, int, int, int],
    keys: int,
    size: tuple[int, int],
    share: float = 0.5,
    lead: tuple[int, int] | None = None,
    dim_v: int | None = None,
) -> Case:
    """``share`` of the blocks are seen, none of them by the last row of blocks if B > 1."""

    def make(gen: torch.Generator) -> Inputs:
        b, h, n, d = shape
        grid = (-(-n // size[0]), -(-keys // size[1]))
        blocks = torch.rand(*(lead or (b, h)), *grid, generator=gen) < share
        if b > 1:
            blocks[:, :, -1:] = False
        return {
            "q": torch.randn(b, h, n, d, generator=gen),
            "k": torch.randn(b, h, keys, d, generator=gen),
            "v": torch.randn(b, h, keys, dim_v or d, generator=gen),
            "blocks": blocks,
            "block_q": size[0],
            "block_k": size[1],
            "scale": d**-0.5,
        }

    truth = reference.block_sparse_attention
    return Case(name, op.block_sparse_attention, truth, make, ("q", "k", "v"))


def _topk(
    name: str,
    shape: tuple[int, int, int, int],
    n: int,
    num_keep: int,
    lead: tuple[int, int] = (1, 1),
    threshold: float | None = None,
    masked: bool = False,
    levels: int = 64,
) -> Case:
    """``shape``: B, H, R, r. Multiples of 1 / 8: products are exact, few ``levels`` make ties."""

    def make(gen: torch.Generator) -> Inputs:
        coef = torch.randint(-levels, levels + 1, shape, generator=gen) / 8
        basis = torch.randint(-levels, levels + 1, (*lead, shape[3], n), generator=gen) / 8
        mask = torch.rand(shape[0], n, generator=gen) > 0.4 if masked else None
        given = {"num_keep": num_keep, "threshold": threshold, "mask": mask}
        return {"coef": coef, "basis": basis, **given}

    return Case(name, op.lowrank_topk, reference.lowrank_topk, make, exact=True)


CASES = (
    _index("index", (2, 3, 17, 8), 17, 5),
    _index("index_gathers", (1, 2, 9, 24), 70, 3, dim_v=16),
    _index("index_missing", (2, 2, 20, 16), 13, 6, missing=True),
    _index("index_twice", (1, 1, 6, 8), 9, 4, twice=True),
    _index("index_all_keys", (1, 2, 7, 48), 5, 5),
    _index("index_one_token", (1, 2, 1, 8), 1, 1),
    _index("index_no_queries", (1, 2, 0, 8), 5, 2),
    _index("index_no_keys", (2, 1, 4, 8), 0, 0),
    _index("index_of_nothing", (1, 1, 4, 8), 6, 0),
    _blocks("blocks", (2, 3, 32, 8), 32, (8, 8)),
    _blocks("blocks_uneven", (1, 2, 37, 24), 29, (16, 8), dim_v=16),
    _blocks("blocks_shared", (2, 2, 20, 16), 50, (4, 16), lead=(1, 1)),
    _blocks("blocks_whole", (1, 2, 9, 48), 11, (16, 16), share=1.0),
    _blocks("blocks_none", (1, 1, 8, 8), 8, (4, 4), share=0.0),
    _blocks("blocks_no_queries", (1, 1, 0, 8), 8, (4, 4)),
    _topk("topk", (2, 3, 11, 8), 19, 5),
    _topk("topk_ties", (1, 2, 9, 2), 33, 12, levels=2),
    _topk("topk_own_basis", (2, 2, 5, 4), 17, 4, lead=(2, 2)),
    _topk("topk_threshold", (1, 2, 9, 4), 21, 21, threshold=20.0),
    _topk("topk_masked", (2, 1, 7, 4), 15, 9, masked=True, levels=3),
    _topk("topk_everything", (1, 1, 3, 2), 6, 6),
    _topk("topk_no_rows", (1, 1, 0, 2), 6, 3),
    _topk("topk_no_rank", (1, 1, 3, 0), 6, 3),
)
