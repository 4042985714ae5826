# SPDX-License-Identifier: Apache-2.0
"""Named inputs of ``reduce_tokens`` and ``bipartite_match`` for the shared test."""

from __future__ import annotations

import torch

from visprune.kernels.common.spec import Case, Inputs

from . import op, reference

# (name, batch, tokens, slots, features)
BENCH_SHAPES = (("llava_576", 8, 576, 64, 4096), ("llava_next_2880", 1, 2880, 288, 4096))


def _reduce(
    name: str,
    shape: tuple[int, int, int, int, int],
    source: bool = False,
    slot: bool = False,
    weight: bool = False,
) -> Case:
    """``shape``: batch, tokens, entries, slots, features."""

    def make(gen: torch.Generator) -> Inputs:
        b, n, e, k, d = shape
        return {
            "x": torch.randn(b, n, d, generator=gen),
            "source": torch.randint(-1, n, (b, e), generator=gen) if source else None,
            "slot": torch.randint(-1, k, (b, e), generator=gen) if slot else None,
            "weight": torch.rand(b, e, generator=gen) if weight else None,
            "num_slots": k,
        }

    grads = ("x", "weight") if weight else ("x",)
    return Case(name, op.reduce_tokens, reference.reduce_tokens, make, grads=grads)


def _match(
    name: str, shape: tuple[int, int, int], r: int, cls: bool = False, dist: bool = False
) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        return {
            "metric": torch.randn(shape, generator=gen),
            "r": r,
            "class_token": cls,
            "distill_token": dist,
        }

    return Case(name, op.bipartite_match, reference.bipartite_match, make, exact=True)


CASES = (
    _reduce("gather", (2, 13, 5, 5, 7), source=True),
    _reduce("gather_weighted", (2, 13, 5, 5, 7), source=True, weight=True),
    _reduce("merge", (2, 13, 13, 4, 9), slot=True),
    _reduce("merge_weighted", (2, 13, 13, 4, 9), slot=True, weight=True),
    _reduce("pairs", (2, 13, 21, 6, 33), source=True, slot=True, weight=True),
    _reduce("one_token", (1, 1, 1, 1, 3), slot=True, weight=True),
    _reduce("no_entries", (2, 6, 0, 3, 4), source=True, slot=True),
    _reduce("no_images", (0, 6, 6, 3, 4), slot=True),
    _match("match", (2, 20, 16), 6),
    _match("match_class", (2, 21, 16), 10, cls=True),
    _match("match_distill", (1, 22, 16), 7, cls=True, dist=True),
    _match("match_none", (2, 9, 8), 0),
)
