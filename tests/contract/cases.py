# SPDX-License-Identifier: Apache-2.0
"""What the contract runs over: every method on every family, and the prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
import visprune.catalog
from tests import tiny
from visprune.machine.plan import inside_only

# What acts inside the image encoder alone has a contract of its own: test_vision_site.py.
INSIDE = [
    name for name in visprune.list_methods() if inside_only(visprune.catalog.methods.get(name))
]
METHODS = [name for name in visprune.list_methods() if name not in INSIDE]
# The registry names every family; the tiny models are built for these.
FAMILIES = tiny.FAMILIES
NO_CLASS_TOKEN = ("qwen2_vl", "qwen2_5_vl")
UNSUPPORTED = {("visionzip", family) for family in NO_CLASS_TOKEN}
ALL_PAIRS = [(method, family) for family in FAMILIES for method in METHODS]
PAIRS = [pair for pair in ALL_PAIRS if pair not in UNSUPPORTED]
MERGING = ("visionzip", "pool")
DROPPING = [pair for pair in PAIRS if pair[0] not in (*MERGING, "keep_all")]
LINE_FAMILIES = ("llava", "llava_next")

every_pair = pytest.mark.parametrize(("name", "family"), PAIRS)
every_dropping_pair = pytest.mark.parametrize(("name", "family"), DROPPING)
every_family = pytest.mark.parametrize("family", FAMILIES)


def everything(name: str) -> dict[str, Any]:
    """Parameters under which a method drops nothing."""
    if name == "keep_all":
        return {}
    return {"keep_ratio": 1.0, **({"tau": 0.0} if name == "todre" else {})}


def few(name: str, num_keep: int = 5, **params: Any) -> dict[str, Any]:
    """Parameters under which a method keeps ``num_keep`` tokens of each picture."""
    if name == "keep_all":
        return params
    return {"num_keep": num_keep, **({"tau": 0.0} if name == "todre" else {}), **params}


def prompts(family: str) -> list[list[Any]]:
    """A batch with everything: left padding, two pictures (of two sizes) in a row, none in one."""
    return [[3, "a", 6], [2, "b", 4, "c" if family == "llava" else "C", 3], [5]]


def batch(family: str, rows: list[list[Any]] | None = None, **options: Any) -> dict[str, Any]:
    """Model inputs of :func:`prompts`, or of ``rows``."""
    return tiny.inputs(family, prompts(family) if rows is None else rows, **options)


def places(family: str, inputs: dict[str, Any]) -> list[tuple[int, Tensor, Tensor]]:
    """(row, droppable places, protected places) of every picture, by the families' own layouts."""
    marked = (inputs["input_ids"] == tiny.IMAGE).nonzero()
    sizes, protected = _sizes(family, inputs)
    assert sum(sizes) == len(marked)
    out = []
    for span, fixed in zip(marked.split(sizes), protected, strict=True):
        out.append((int(span[0, 0]), span[~fixed, 1], span[fixed, 1]))
    return out


def _sizes(family: str, inputs: dict[str, Any]) -> tuple[list[int], list[Tensor]]:
    if family == "llava":
        sizes = [36] * len(inputs["pixel_values"])
    elif family == "llava_next":
        # A thumbnail of 6 x 6, then rows of 6 patches per tile with a newline token at the end.
        grids = [(h // 4, w // 4) for h, w in inputs["image_sizes"].tolist()]
        sizes = [36 + rows * (columns + 1) for rows, columns in grids]
        ends = [
            (torch.arange(n) >= 36) & ((torch.arange(n) - 36) % (columns + 1) == columns)
            for n, (_, columns) in zip(sizes, grids, strict=True)
        ]
        return sizes, ends
    else:
        sizes = [t * h * w // 4 for t, h, w in inputs["image_grid_thw"].tolist()]
    return sizes, [torch.zeros(n, dtype=torch.bool) for n in sizes]
