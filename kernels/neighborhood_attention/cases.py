# SPDX-License-Identifier: Apache-2.0
"""Named inputs of neighborhood attention and of its unfused pair for the shared test and bench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visprune.kernels.common.spec import Case, Inputs

from . import op, reference


@dataclass(frozen=True)
class Shape:
    """A bench shape: the levels of NAT-Mini at 224 and 448 pixels."""

    name: str
    length: int
    heads: int
    dilations: tuple[int, ...]
    dim: int = 32
    kernel: int = 7
    batch: int = 1


BENCH_SHAPES = (
    Shape("level3", 14, 8, (1, 2)),
    Shape("level2", 28, 4, (1, 4)),
    Shape("level1", 56, 2, (1, 8)),
    Shape("level1_448", 112, 2, (1, 8)),
)


# Pictures around the change from tiles to fused attention.
SMALL_SHAPES = tuple(
    Shape("small", length, heads, dilations, kernel=kernel, batch=batch)
    for length, heads, kernel, dilations in (
        (7, 16, 7, (1,)),
        (7, 4, 3, (1, 2)),
        (10, 8, 7, (1,)),
        (14, 2, 7, (1,)),
        (14, 8, 3, (1,)),
        (14, 8, 7, (1, 2)),
        (14, 8, 13, (1,)),
        (14, 16, 7, (1,)),
        (20, 8, 7, (1, 2)),
        (20, 8, 13, (1,)),
        (28, 4, 3, (1,)),
        (28, 4, 13, (1, 2)),
    )
    for batch in (1, 8)
)


def _joined(attend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Output and log-sum-exp as one tensor, so that both and both gradients are compared."""

    def call(**inputs: Any) -> Tensor:
        out, lse = attend(**inputs)
        return torch.cat([out.to(lse.dtype), lse[..., None]], -1)

    return call


def _finite(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Zero where a causal window is shorter: -inf on both sides has no difference."""

    def call(**inputs: Any) -> Tensor:
        out = score(**inputs)
        return out.masked_fill(out.isneginf(), 0.0)

    return call


@dataclass(frozen=True)
class Window:
    """Space and window of a case, one value for each axis."""

    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()

    def inputs(self) -> Inputs:
        """The parameters as the custom ops take them."""
        ones = (1,) * len(self.space)
        return {
            "kernel_size": list(self.kernel),
            "stride": list(self.stride or ones),
            "dilation": list(self.dilation or ones),
            "is_causal": list(self.causal or (False,) * len(self.space)),
        }


def _bias(window: Window, heads: int, gen: torch.Generator) -> Tensor:
    return torch.randn(heads, *(2 * k - 1 for k in window.kernel), generator=gen)


def _fused(
    name: str,
    window: Window,
    dims: tuple[int, int, int, int] = (1, 2, 8, 8),  # B, H, D, Dv
    bias: bool = False,
    extra: int = 0,
) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        b, h, d, dv = dims
        made: Inputs = {
            key: torch.randn(b, *window.space, h, width, generator=gen)
            for key, width in (("q", d), ("k", d), ("v", dv))
        }
        made["rpb"] = _bias(window, h, gen) if bias else None
        for key, width in (("additional_keys", d), ("additional_values", dv)):
            made[key] = torch.randn(b, extra, h, width, generator=gen) if extra else None
        return {**made, **window.inputs(), "scale": d**-0.5}

    grads: Sequence[str] = ("q", "k", "v")
    grads = (*grads, *(("rpb",) if bias else ()))
    grads = (*grads, *(("additional_keys", "additional_values") if extra else ()))
    fused = partial(op.neighborhood_attention, with_lse=True)
    attend = _joined(fused), _joined(reference.neighborhood_attention)
    return Case(name, *attend, make, grads=tuple(grads))


def _qk(name: str, window: Window, dim: int = 8, bias: bool = False) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        made: Inputs = {x: torch.randn(1, *window.space, 2, dim, generator=gen) for x in ("q", "k")}
        made["rpb"] = _bias(window, 2, gen) if bias else None
        return {**made, **window.inputs(), "scale": dim**-0.5}

    grads = ("q", "k", "rpb") if bias else ("q", "k")
    return Case(name, _finite(op.na_qk), _finite(reference.na_qk), make, grads=grads)


def _av(name: str, window: Window, dim: int = 8) -> Case:
    def make(gen: torch.Generator) -> Inputs:
        count = op.axis.product(window.kernel)
        return {
            "attn": torch.randn(2, *window.space, 1, count, generator=gen),
            "v": torch.randn(2, *window.space, 1, dim, generator=gen),
            **window.inputs(),
        }

    return Case(name, op.na_av, reference.na_av, make, grads=("attn", "v"))


CAUSAL = (True, False)
CASES = (
    _fused("line", Window((11,), (5,)), (2, 2, 8, 8)),
    _fused("line_even_dilated", Window((14,), (4,), dilation=(3,)), (1, 2, 24, 24)),
    _fused("line_causal", Window((12,), (5,), (3,), (2,), (True,)), (2, 1, 8, 8), bias=True),
    _fused("plane", Window((9, 7), (3, 5)), (1, 1, 24, 24)),
    _fused("plane_whole", Window((5, 5), (5, 5)), bias=True),
    _fused("plane_dilated_bias", Window((6, 8), (3, 4), (), (2, 1)), (2, 1, 48, 48), bias=True),
    _fused("plane_windows", Window((8, 6), (4, 3), (4, 3)), (2, 1, 8, 8)),
    _fused("plane_stride_bias", Window((7, 9), (5, 4), (2, 3)), bias=True),
    _fused("plane_mixed", Window((9, 6), (4, 3), (2, 1), (2, 1), CAUSAL), bias=True),
    _fused("plane_extra", Window((6, 7), (3, 4)), bias=True, extra=3),
    _fused("plane_value_dim", Window((6, 5), (3, 3)), (1, 2, 8, 20), extra=1),
    _fused("line_groups", Window((12,), (4,), dilation=(3,)), (2, 2, 8, 8)),
    _fused("plane_groups_bias", Window((6, 10), (3, 5), (2, 1), (2, 2)), (2, 1, 24, 24), bias=True),
    _fused("plane_groups_extra", Window((6, 4), (3, 4), (), (2, 1)), (1, 2, 8, 12), extra=2),
    _fused("space_groups", Window((4, 3, 4), (2, 3, 2), (), (2, 1, 2)), (1, 1, 8, 8)),
    _fused("no_images_groups", Window((4, 4), (2, 2), (), (2, 2)), (0, 2, 8, 8), bias=True),
    _fused("space", Window((3, 6, 5), (2, 3, 3)), (1, 1, 8, 8)),
    _fused("space_mixed", Window((4, 4, 5), (2, 4, 2), (1, 2, 1), (2, 1, 2), (True, False, False)),
           (1, 1, 8, 8), bias=True),
    _fused("one_token", Window((1, 1), (1, 1)), bias=True),
    _fused("no_images", Window((4, 4), (3, 3)), (0, 2, 8, 8), bias=True, extra=2),
    _qk("qk_line_causal", Window((9,), (4,), (2,), (2,), (True,)), bias=True),
    _qk("qk_plane", Window((6, 7), (3, 4), (1, 2), (2, 1)), 24, bias=True),
    _qk("qk_space", Window((3, 4, 4), (2, 3, 2))),
    _av("av_line_causal", Window((9,), (4,), (2,), (2,), (True,))),
    _av("av_plane", Window((6, 7), (3, 4), (1, 2), (2, 1)), 24),
    _av("av_space", Window((3, 4, 4), (2, 3, 2))),
)  # fmt: skip
