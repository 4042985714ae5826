# SPDX-License-Identifier: Apache-2.0
"""Named inputs of ``attention_rows`` and ``column_sums`` for the shared test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visprune.kernels.common.spec import Case, Inputs

from . import op, reference

# (name, heads, key heads, rows, tokens, head dim)
BENCH_SHAPES = (
    ("last_query_7b", 32, 32, 1, 640, 128),
    ("text_40_7b", 32, 32, 40, 2920, 128),
    ("text_40_gqa", 28, 4, 40, 2920, 128),
)


def _mask(kind: str | None, b: int, h: int, r: int, n: int, gen: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    if kind == "bool":
        mask = torch.rand(b, 1, r, n, generator=gen) > 0.3
        mask[:, :, -1] = False  # a row that may see nothing
        return mask
    if kind == "keys":
        return torch.rand(b, 1, 1, n, generator=gen) > 0.2
    return torch.randn(b, h, 1, n, generator=gen)


def _rows(
    name: str,
    shape: tuple[int, int, int, int, int, int],
    reduce: str = "none",
    mask: str | None = None,
    softcap: float = 0.0,
    causal: bool = False,
) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        b, h, kv, r, n, d = shape
        pos = torch.randint(0, max(n, 1), (b, r), generator=gen) if causal else None
        return {
            "q": torch.randn(b, h, r, d, generator=gen),
            "k": torch.randn(b, kv, n, d, generator=gen),
            "scale": d**-0.5,
            "mask": _mask(mask, b, h, r, n, gen),
            "row_pos": pos,
            "reduce": reduce,
            "softcap": softcap,
        }

    return Case(name, op.attention_rows, reference.attention_rows, make, grads=("q", "k"))


def _columns_reference(block: int, **inputs: Any) -> Tensor:
    return reference.column_sums(**inputs)


def _columns(
    name: str,
    shape: tuple[int, int, int, int, int, int],
    reduce: str = "mean",
    mask: str | None = None,
    causal: bool = False,
    block: int = 4,
    softcap: float = 0.0,
    weighted: bool = False,
) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        b, h, kv, r, n, d = shape
        return {
            "q": torch.randn(b, h, r, d, generator=gen),
            "k": torch.randn(b, kv, n, d, generator=gen),
            "scale": d**-0.5,
            "mask": _mask(mask, b, h, r, n, gen),
            "causal": causal,
            "row_weight": torch.rand(b, r, generator=gen) if weighted else None,
            "reduce": reduce,
            "block": block,
            "softcap": softcap,
        }

    return Case(name, op.column_sums, _columns_reference, make, grads=("q", "k"))


CASES = (
    _rows("rows", (2, 4, 4, 3, 17, 8)),
    _rows("rows_gqa_mean", (2, 6, 2, 5, 70, 24), "mean"),
    _rows("rows_max", (1, 4, 1, 2, 33, 16), "max", softcap=3.0),
    _rows("rows_bool", (2, 4, 2, 4, 21, 8), "sum", mask="bool"),
    _rows("rows_additive", (2, 4, 2, 4, 21, 8), "none", mask="additive"),
    _rows("rows_causal", (2, 2, 1, 6, 19, 48), "mean", causal=True, mask="keys"),
    _rows("rows_one_token", (1, 2, 1, 1, 1, 8), "mean"),
    _rows("rows_no_rows", (1, 2, 1, 0, 5, 8)),
    _rows("rows_no_keys", (1, 2, 1, 3, 0, 8), "max"),
    _columns("columns", (2, 4, 2, 18, 18, 8)),
    _columns("columns_causal", (2, 4, 2, 18, 23, 24), "sum", causal=True, weighted=True),
    _columns("columns_more_rows", (1, 2, 2, 9, 5, 8), "none", causal=True, softcap=2.0),
    _columns("columns_masked", (2, 2, 1, 7, 20, 16), "none", mask="bool", weighted=True),
    _columns("columns_one_token", (1, 2, 2, 1, 1, 8)),
    _columns("columns_no_rows", (1, 2, 2, 0, 6, 8)),
)
