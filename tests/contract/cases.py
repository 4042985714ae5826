# SPDX-License-Identifier: Apache-2.0
"""What the contract runs over: every method on every family, and the prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
import visprune.catalog
from tests import tiny
from visprune.core.method import ModelSpec
from visprune.machine.plan import acts_before, acts_on_cache, inside_only, why_not

# What acts inside the image encoder alone has a contract of its own: test_vision_site.py.
INSIDE = [
    name for name in visprune.list_methods() if inside_only(visprune.catalog.methods.get(name))
]
# So has what acts on the cache alone: test_cache_stage.py.
CACHE = [
    name for name in visprune.list_methods() if acts_on_cache(visprune.catalog.methods.get(name))
]
# And what acts before the encoder: tests/families/test_pixels.py.
BEFORE = [
    name for name in visprune.list_methods() if acts_before(visprune.catalog.methods.get(name))
]
EVERY = [name for name in visprune.list_methods() if name not in (*INSIDE, *CACHE, *BEFORE)]
# The registry names every family; the tiny models are built for these.
FAMILIES = tiny.FAMILIES
NO_CLASS_TOKEN = ("qwen2_vl", "qwen2_5_vl")
# These take every path of the machine, and run on every family of the suite. What came later takes
# the same paths: what holds of every method is in test_every_method.py, in a second each, and some
# that act inside the decoder run the whole suite on one family of each kind besides.
FIRST = ("todre", "divprune", "fastv", "pyramiddrop", "visionzip", "keep_all", "random", "uniform",
         "pool")  # fmt: skip
METHODS = [*FIRST, "random_deep", "v2drop", "dart", "vtw"]
LATER_FAMILIES = ("llava", "qwen2_5_vl")
# Options under which a method without a budget drops nothing (None: there are none), and some.
NO_BUDGET: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "keep_all": ({}, {}),
    "vtw": (None, {}),
    "ivc_prune": ({"foreground": 1.0}, {}),
    "sparsevlm": ({"lists": (10_000, 10_000, 10_000)}, {"lists": (12, 8, 5)}),
    "lightkv": ({"ratios": (0.0, 0.0, 0.0)}, {"windows": (1, 1, 1)}),
    "pact": ({"share": 1.0, "cutoff": 0.0, "layer": 2}, {"layer": 2}),
}
# Methods with a published setting that no budget names, which stands where none is given.
OPTIONAL_BUDGET = ("v2drop",)
# These thin out clips alone.
WHOLE_PICTURES = ("evs",)
# Their rules read rotated keys by themselves: another place in the sequence, another choice.
BY_PLACE = ("dart", "ivc_prune")
NO_ATTENTION = ModelSpec("", num_layers=4, has_cls=False, multi_axis_rope=True, encoder_refusal="-",
                         lacking={"encoder_attention": "its encoder packs pictures"})  # fmt: skip
NEEDS_CLASS_TOKEN = tuple(
    name for name in METHODS if why_not(visprune.catalog.methods.get(name), NO_ATTENTION)
)
UNSUPPORTED = {
    (name, family)
    for name in NEEDS_CLASS_TOKEN
    for family in NO_CLASS_TOKEN
    if name in FIRST or family in LATER_FAMILIES
}
ALL_PAIRS = [
    (method, family)
    for family in FAMILIES
    for method in METHODS
    if method in FIRST or family in LATER_FAMILIES
]
PAIRS = [pair for pair in ALL_PAIRS if pair not in UNSUPPORTED]
MERGING = ("visionzip", "pool")
BUDGETED = [pair for pair in PAIRS if pair[0] not in NO_BUDGET or pair[0] == "keep_all"]
LOSSLESS = [pair for pair in PAIRS if NO_BUDGET.get(pair[0], ({}, {}))[0] is not None]
DROPPING = [pair for pair in PAIRS if pair[0] not in (*MERGING, "keep_all")]
LINE_FAMILIES = ("llava", "llava_next")

every_pair = pytest.mark.parametrize(("name", "family"), PAIRS)
every_budgeted_pair = pytest.mark.parametrize(("name", "family"), BUDGETED)
every_lossless_pair = pytest.mark.parametrize(("name", "family"), LOSSLESS)
every_dropping_pair = pytest.mark.parametrize(("name", "family"), DROPPING)
every_family = pytest.mark.parametrize("family", FAMILIES)

# Beside a budget: thresholds under which the budget alone decides.
BESIDE: dict[str, dict[str, Any]] = {"todre": {"tau": 0.0}, "vitcop": {"visual": 1.0}}


def takes(name: str) -> set[str]:
    """Names of a method's parameters."""
    return {field.name for field in dataclasses.fields(visprune.catalog.methods.get(name))}


def everything(name: str) -> dict[str, Any]:
    """Parameters under which a method drops nothing; what a method without such takes else."""
    if name in NO_BUDGET:
        lossless, some = NO_BUDGET[name]
        return dict(some if lossless is None else lossless)
    return {"keep_ratio": 1.0, **BESIDE.get(name, {})}


def few(name: str, num_keep: int = 5, **params: Any) -> dict[str, Any]:
    """Parameters under which a method keeps ``num_keep`` tokens of each picture, or few."""
    if name in NO_BUDGET:
        return {**NO_BUDGET[name][1], **params}
    budget = {"num_keep": num_keep} if "num_keep" in takes(name) else {"keep_ratio": 0.3}
    return {**budget, **BESIDE.get(name, {}), **params}


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
