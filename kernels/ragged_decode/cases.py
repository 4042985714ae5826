# SPDX-License-Identifier: Apache-2.0
"""Named inputs of ragged decoding, over numbers and over codes, for the shared test."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from visprune.kernels.common.spec import Case, Inputs

from . import op, quantize, reference

# (name, slots of a dense cache, heads, key heads, head dim)
BENCH_SHAPES = (
    ("llava_576", 576, 32, 32, 128),
    ("gqa_576", 576, 32, 8, 128),
    ("gqa_2880", 2880, 32, 8, 128),
    ("gqa_8k", 8192, 32, 8, 128),
    ("gqa_32k", 32768, 32, 8, 128),
)


def layout(counts: Sequence[int], room: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Offsets of segments that hold ``counts`` slots and have room for ``room`` more; counts."""
    sizes = [c + r for c, r in zip(counts, room or [0] * len(counts), strict=True)]
    return torch.tensor([0, *accumulate(sizes)]), torch.tensor(counts, dtype=torch.int64)


def _storage(
    shape: tuple[int, int, int, int, int],
    counts: Sequence[int],
    room: Sequence[int] | None,
    biased: str | None,
    gen: torch.Generator,
) -> Inputs:
    b, h, r, d, dv = shape
    offsets, lengths = layout(counts, room)
    slots = int(offsets[-1])
    bias = None
    if biased == "counts":
        bias = torch.randint(1, 9, (slots,), generator=gen).float().log()
    elif biased == "hidden":  # a head of which nothing may be seen, and slots of others
        bias = torch.where(torch.rand(slots, generator=gen) < 0.3, -torch.inf, 0.0)
        bias[: int(offsets[1])] = -torch.inf
    return {
        "q": torch.randn(b, h, r, d, generator=gen),
        "k": torch.randn(slots, d, generator=gen),
        "v": torch.randn(slots, dv, generator=gen),
        "offsets": offsets,
        "lengths": None if room is None else lengths,
        "scale": d**-0.5,
        "bias": bias,
    }


def _decode(**inputs: Any) -> Tensor:
    out: Tensor = op.ragged_decode(**inputs, with_lse=False)[0]
    return out


def _decode_lse(**inputs: Any) -> Tensor:
    lse: Tensor = op.ragged_decode(**inputs, with_lse=True)[1]
    return lse


def _quantized(**inputs: Any) -> Tensor:
    out: Tensor = op.ragged_decode_quantized(**inputs, with_lse=False)[0]
    return out


def _case(
    name: str,
    shape: tuple[int, int, int, int, int],
    counts: Sequence[int],
    room: Sequence[int] | None = None,
    bias: str | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    lse: bool = False,
) -> Case:
    """``shape``: batch, heads, queries, key and value channels."""

    def make(gen: torch.Generator) -> Inputs:
        made = _storage(shape, counts, room, bias, gen)
        return {**made, "causal": causal, "softcap": softcap}

    def truth(**inputs: Any) -> Tensor:
        return reference.ragged_decode(**inputs)[int(lse)]

    return Case(name, _decode_lse if lse else _decode, truth, make)


def _codes(
    name: str,
    shape: tuple[int, int, int, int, int],
    counts: Sequence[int],
    bits: tuple[int, int],
    groups: tuple[int, int],
    per_channel: tuple[bool, bool] = (True, False),
    room: Sequence[int] | None = None,
    bias: str | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        made = _storage(shape, counts, room, bias, gen)
        pairs = zip(bits, groups, per_channel, strict=True)
        for x, (bit, group, channel) in zip("kv", pairs, strict=True):
            parts = quantize.quantize(made[x], bit, group, channel, None)
            made |= dict(zip((x, f"{x}_scale", f"{x}_zero"), parts, strict=True))
        made |= {"bits": bits, "groups": groups, "per_channel": per_channel}
        return {**made, "causal": causal, "softcap": softcap}

    def truth(**inputs: Any) -> Tensor:
        return reference.ragged_decode_quantized(**inputs)[0]

    return Case(name, _quantized, truth, make)


CASES = (
    _case("ragged", (1, 4, 1, 8, 8), (5, 17)),
    _case("gqa_batch", (2, 6, 1, 24, 16), (3, 70, 1, 9, 40, 12)),
    _case("queries_causal", (1, 4, 5, 16, 16), (9, 3), causal=True, softcap=3.0),
    _case("queries_open", (2, 4, 3, 8, 8), (9, 3, 1, 130)),
    _case("blocks", (1, 8, 1, 16, 16), (40, 64, 7, 96), (24, 0, 25, 32)),
    _case("blocks_counts", (1, 4, 2, 16, 8), (40, 64), (24, 0), bias="counts"),
    _case("blocks_hidden", (2, 2, 1, 8, 8), (20, 40, 0, 33), (12, 24, 32, 31), bias="hidden"),
    _case("room", (1, 4, 2, 8, 8), (5, 0, 11, 2), (3, 4, 0, 1), bias="hidden"),
    _case("lse", (1, 6, 2, 8, 8), (50, 4, 7), bias="counts", lse=True),
    _case("many_rows", (1, 8, 6, 16, 16), (67,), causal=True),
    _case("one_slot", (1, 1, 1, 8, 8), (1,)),
    _case("no_slots_in_a_head", (1, 4, 2, 8, 8), (0, 6), causal=True),
    _case("ragged_no_slots", (1, 2, 1, 8, 8), (0, 0)),
    _case("ragged_no_queries", (1, 2, 0, 8, 8), (3, 4)),
    _case("ragged_no_batch", (0, 2, 1, 8, 8), ()),
    _codes("codes_4", (1, 4, 1, 16, 16), (37, 70), (4, 4), (32, 8)),
    _codes("codes_2", (2, 4, 2, 32, 16), (8, 20, 0, 33), (2, 2), (8, 16), causal=True),
    _codes("codes_mixed", (1, 2, 1, 24, 8), (11, 45), (4, 2), (7, 3), (False, True), (2, 3),
           "counts", softcap=2.0),
    _codes("codes_8", (1, 2, 1, 16, 16), (40, 9), (8, 8), (16, 16), room=(8, 7)),
    _codes("codes_no_slots", (1, 2, 1, 8, 8), (0, 0), (4, 4), (8, 8)),
)  # fmt: skip
