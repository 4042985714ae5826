# SPDX-License-Identifier: Apache-2.0
"""Named inputs of ``hilo_attention`` for the shared test and the bench."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.kernels.common.spec import Case, Inputs

from . import op, reference

# (name, tokens along one side, channels, heads, window size, share of low heads, batch)
BENCH_SHAPES = (
    ("litv2_s stage 3", 14, 384, 12, 2, 0.9, 1),
    ("litv2_s stage 3", 14, 384, 12, 2, 0.9, 8),
    ("alpha 0.5", 14, 384, 12, 2, 0.5, 1),
    ("litv2_s stage 4", 7, 768, 24, 1, 0.9, 1),
    ("width 768", 14, 768, 12, 2, 0.9, 1),
    ("width 768, alpha 0.5", 14, 768, 12, 2, 0.5, 1),
    ("windows of 7", 14, 768, 12, 7, 0.5, 1),
    ("dense prediction", 56, 256, 8, 2, 0.5, 1),
    ("dense prediction", 56, 256, 8, 2, 0.9, 1),
    ("dense prediction", 56, 256, 8, 4, 0.5, 1),
    ("dense prediction", 56, 256, 8, 7, 0.5, 1),
)


def _case(
    name: str,
    space: tuple[int, int, int],
    heads: tuple[int, int],
    dim: int,
    ws: int,
    masked: bool = False,
    pads: bool = False,
    keys: tuple[int, int] | None = None,
    triton: bool = True,
) -> Case:
    """``heads``: high and low; 0 leaves the branch out. ``keys``: another low grid."""

    def make(gen: torch.Generator) -> Inputs:
        batch, height, width = space
        rows, cols = keys or (-(-height // ws), -(-width // ws))

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dim, generator=gen)

        high = [draw(*space, heads[0]) if heads[0] else None for _ in range(3)]
        low = [draw(*space, heads[1]) if heads[1] else None]
        low += [draw(batch, rows, cols, heads[1]) if heads[1] else None for _ in range(2)]
        pad = [draw(heads[0]) if pads else None for _ in range(2)]
        named = zip(NAMES, (*high, *low, *pad), strict=True)
        return {**dict(named), "window_size": ws, "scale": dim**-0.5, "masked": masked}

    return Case(name, op.hilo_attention, reference.hilo_attention, make, NAMES, triton=triton)


NAMES = ("q", "k", "v", "low_q", "low_k", "low_v", "pad_k", "pad_v")

CASES = (
    _case("hilo", (2, 6, 4), (2, 3), 8, 2),
    _case("hilo_window_7", (1, 14, 7), (2, 1), 24, 7),
    _case("hilo_window_4_padded", (2, 7, 10), (2, 2), 16, 4, pads=True),
    _case("hilo_padded_with_zeros", (1, 5, 3), (1, 2), 8, 2),
    _case("hilo_masked", (2, 7, 5), (2, 1), 16, 4, masked=True),
    _case("hilo_window_1", (1, 5, 3), (2, 1), 8, 1),
    _case("hilo_high_only", (1, 4, 6), (4, 0), 8, 2),
    _case("hilo_low_only", (2, 3, 5), (0, 3), 48, 1),
    _case("hilo_many_keys", (1, 13, 11), (1, 2), 8, 1, triton=False),
    _case("hilo_other_grid", (2, 5, 5), (1, 1), 8, 2, keys=(2, 1)),
    _case("hilo_one_token", (1, 1, 1), (1, 1), 8, 2, pads=True),
    _case("hilo_no_images", (0, 4, 4), (1, 1), 8, 2),
    _case("hilo_no_rows", (1, 0, 4), (1, 1), 8, 2),
)
