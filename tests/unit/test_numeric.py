# SPDX-License-Identifier: Apache-2.0
"""Numbers of NumPy are taken wherever Python's are, and are Python's from then on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import timm
import torch

import visprune
from tests import tiny
from visprune import ops
from visprune.backbones.vit import with_attention
from visprune.backbones.vit.with_attention_saved import calls_of
from visprune.core.budget import Budget
from visprune.core.checked import build_section
from visprune.core.numeric import is_number, is_whole, plain
from visprune.core.site import Site
from visprune.errors import BudgetError, ConfigError
from visprune.eval.study.variants import expand
from visprune.eval.tasks.base import get_task
from visprune.methods.fastv import FastV
from visprune.methods.tome import ToMe


def test_what_is_a_number() -> None:
    whole = [3, np.int64(3), np.uint8(3)]
    real = [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)]
    assert all(is_whole(x) and is_number(x) and type(plain(x)) is int for x in whole)
    assert all(is_number(x) and not is_whole(x) and type(plain(x)) is float for x in real)
    for none in (True, np.bool_(True), "1", None, np.array([1, 2]), torch.tensor(3), 1j):
        assert not is_number(none)
        assert not is_whole(none)
    assert plain([np.int64(1), (np.float32(0.5), "a")]) == [1, (0.5, "a")]


@pytest.mark.parametrize(
    ("name", "given", "want"),
    [
        ("divprune", {"num_keep": np.int64(9)}, {"num_keep": 9}),
        ("divprune", {"keep_ratio": np.float32(0.25)}, {"keep_ratio": 0.25}),
        ("fastv", {"num_keep": np.uint8(9), "layer": np.int32(1)}, {"num_keep": 9, "layer": 1}),
        ("pyramiddrop", {"num_keep": 3, "depths": list(np.array([0.25, 0.5]))},
         {"num_keep": 3, "depths": (0.25, 0.5)}),
        ("tome", {"r": np.int64(4)}, {"r": 4}),
        ("tome", {"r": [np.int64(1), 0, 0]}, {"r": (1, 0, 0)}),
        ("evit", {"keep_ratio": np.float64(0.5), "layers": [np.int64(1)]},
         {"keep_ratio": 0.5, "layers": (1,)}),
        ("pitome", {"keep_ratio": np.float16(0.75)}, {"keep_ratio": 0.75}),
        ("random", {"num_keep": 2, "seed": np.int64(7)}, {"num_keep": 2, "seed": 7}),
    ],
)  # fmt: skip
def test_a_method_takes_and_stores_them(
    name: str, given: dict[str, Any], want: dict[str, Any]
) -> None:
    built = visprune.get_method(name, **given)
    assert built == visprune.get_method(name, **want)
    stored = json.loads(json.dumps(built.to_dict()))
    assert {key: stored[key] for key in want} == json.loads(json.dumps(want))


def test_a_built_method_is_made_plain_when_it_is_used() -> None:
    built = FastV(num_keep=np.int64(9), layer=np.int64(1))
    visprune.prune(tiny.build("llava"), built).remove()
    assert json.loads(json.dumps(built.to_dict()))["layer"] == 1
    assert type(ToMe(r=np.int64(4)).r) is int
    budget = Budget(keep_ratio=np.float64(0.5))
    assert type(budget.keep_ratio) is float
    assert Site.decoder(np.float32(0.5)).resolve(8) == 4
    assert Site.decoder(np.int16(3)).resolve(8) == 3


@pytest.mark.parametrize("wrong", [np.bool_(True), np.float64(9.0), torch.tensor(9)])
def test_what_is_no_whole_number_is_refused(wrong: Any) -> None:
    with pytest.raises(BudgetError, match="whole number of tokens"):
        visprune.get_method("divprune", num_keep=wrong)
    with pytest.raises(BudgetError, match="how many pairs merge"):
        visprune.get_method("tome", r=wrong)


def test_studies_tasks_and_recipes_take_them() -> None:
    rows, _ = expand(["divprune"], [np.int64(8), np.float64(0.5)], controls=False)
    kept = [json.loads(json.dumps(row.choice.to_dict())) for row in rows]
    assert [(row["num_keep"], row["keep_ratio"]) for row in kept] == [(8, None), (None, 0.5)]
    task = get_task("embedded", limit=np.int64(7), seed=np.int64(1))
    assert (type(task.limit), type(task.seed)) == (int, int)
    with pytest.raises(ConfigError, match="seed is a whole number"):
        get_task("embedded", seed=np.float64(1.0))

    @dataclass
    class Section:
        steps: int
        rate: float

    globals()["Section"] = Section
    made = build_section(Section, {"steps": np.int64(3), "rate": np.float32(0.5)}, "recipe")
    assert (type(made.steps), type(made.rate)) == (int, float)
    with pytest.raises(ConfigError, match="recipe: steps"):
        build_section(Section, {"steps": np.float64(3.0), "rate": 1}, "recipe")


def test_operators_and_attention_modules_take_them() -> None:
    q, k, v = torch.randn(3, 1, 6, 6, 2, 8)
    for size in (np.int64(3), (np.int64(3), 3)):
        got = ops.neighborhood_attention(q, k, v, kernel_size=size, dilation=np.int32(2))
        want = ops.neighborhood_attention(q, k, v, kernel_size=3, dilation=2)
        assert torch.equal(got, want)
    assert torch.equal(ops.hilo_pool(q[..., 0], np.int64(2)), ops.hilo_pool(q[..., 0], 2))
    with pytest.raises(ConfigError, match="window_size must be an integer"):
        ops.hilo_pool(q[..., 0], np.float64(2.0))
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    with_attention(vit, "neighborhood", blocks=np.array([1]), kernel_size=np.int64(3))
    assert json.loads(json.dumps(calls_of(vit)))[0]["blocks"] == [1]
