# SPDX-License-Identifier: Apache-2.0
"""Named inputs of ``greedy_diverse`` for the shared test, and the shapes of its bench."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.kernels.common.spec import Case, Inputs

from . import op, reference

# (name, tokens, kept, features): LLaVA-1.5 and LLaVA-NeXT behind a 7B projector.
BENCH_SHAPES = (("llava_576", 576, 64, 4096), ("llava_next_2880", 2880, 288, 4096))


def features(kind: str, n: int, dim: int, gen: torch.Generator) -> Tensor:
    """``normal``: nearly equidistant directions; ``clustered``: n/8 centres with noise."""
    if kind == "normal":
        return torch.randn(n, dim, generator=gen)
    centres = torch.randn(max(1, n // 8), dim, generator=gen)
    near = torch.randint(0, len(centres), (n,), generator=gen)
    return centres[near] + 0.5 * torch.randn(n, dim, generator=gen)


def _reference(
    x: Tensor,
    keep: Tensor | None,
    width: int,
    objective: str,
    rule: str,
    pivot: Tensor | None,
    relevance: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    budgets = [width] * len(x) if keep is None else keep.tolist()
    if not budgets:
        return torch.empty(0, width, dtype=torch.long)
    start = None if pivot is None else pivot.tolist()
    return reference.greedy_diverse(x, budgets, objective, start, rule, relevance, mask)


def _case(
    name: str,
    shape: tuple[int, int, int],
    width: int,
    objective: str = "k_center",
    rule: str = "mean",
    pivot: int | None = None,
    keep: tuple[int, ...] | None = None,
    masked: bool = False,
    kind: str = "normal",
) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        batch, n, dim = shape
        x = torch.stack([features(kind, n, dim, gen) for _ in range(max(1, batch))])[:batch]
        relevance = torch.rand(batch, n, generator=gen) if objective == "dpp" else None
        return {
            "x": x,
            "keep": None if keep is None else torch.tensor(keep),
            "width": width,
            "objective": objective,
            "rule": "given" if pivot is not None else rule,
            "pivot": None if pivot is None else torch.full((batch,), pivot),
            "relevance": relevance,
            "mask": torch.rand(batch, n, generator=gen) > 0.4 if masked else None,
        }

    return Case(name, op.greedy_diverse, _reference, make, exact=True, triton=shape[1] <= 64)


CASES = (
    _case("k_center_mean", (2, 48, 24), 9),
    _case("k_center_given", (1, 33, 17), 33, pivot=5),
    _case("k_center_farthest", (2, 41, 24), 12, rule="farthest_neighbor", kind="clustered"),
    _case("k_center_ragged", (3, 40, 16), 11, keep=(11, 3, 0), masked=True),
    _case("max_sum_mean", (2, 48, 24), 9, "max_sum"),
    _case("max_sum_masked", (2, 37, 24), 8, "max_sum", rule="farthest_neighbor", masked=True),
    _case("dpp", (2, 48, 32), 10, "dpp", rule="relevance"),
    _case("dpp_masked", (2, 39, 32), 7, "dpp", rule="relevance", keep=(7, 4), masked=True),
    _case("one_token", (2, 1, 8), 1, rule="farthest_neighbor"),
    _case("keep_none", (2, 5, 8), 0),
    _case("no_tokens", (2, 0, 8), 0),
    _case("no_images", (0, 6, 8), 3),
    # Large enough for the path that prunes (see torch_impl.prefer_pruned).
    _case("pruned_k_center", (1, 1600, 1024), 120, pivot=3, kind="clustered"),
    _case("pruned_farthest", (1, 2100, 2048), 60, rule="farthest_neighbor"),
    _case("pruned_dpp", (1, 1200, 1024), 64, "dpp", rule="relevance", kind="clustered"),
)
