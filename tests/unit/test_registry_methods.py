# SPDX-License-Identifier: Apache-2.0
"""Every row of the method table: buildable, frozen, described, and the same again from its dict."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import visprune
import visprune.catalog
from visprune.core.method import ModelSpec, PruningMethod
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.encoder.plan import make_encoder_plan
from visprune.machine.plan import acts_before, acts_on_cache, inside_only, make_plan

METHODS = visprune.list_methods()
OTHERS: dict[str, list[dict[str, Any]]] = {
    "todre": [{"num_keep": 7, "objective": "max_sum", "tau": 0.3, "depth": 3}, {"stage1": False},
              {"keep_ratio": 0.2, "stage2": False}],
    "fastv": [{"keep_ratio": 0.3, "layer": 3}, {"num_keep": 7, "layer": 0.5}],
    "pyramiddrop": [{"num_keep": 7, "depths": (0.5, 0.75), "factor": 0.25}],
    "visionzip": [{"num_keep": 7, "contextual": 0}, {"keep_ratio": 0.5, "contextual": 3}],
    "random": [{"num_keep": 7, "seed": 12}],
    "random_deep": [{"num_keep": 7, "seed": 12, "layer": 3}],
    "v2drop": [{}, {"ratios": (0.5, 0.25), "layers": (2, 7)}, {"keep_ratio": 0.1}],
    "dart": [{"num_keep": 7, "pivot_image": 2, "pivot_text": 6, "official": True}],
    "vtw": [{}, {"layer": 3}],
    "ivc_prune": [{}, {"layer": 3, "seeds": 0.1, "skip": 0}],
    "sparsevlm": [{}, {"setting": 64, "version": 2}, {"lists": (9, 5), "layers": (2, 3)},
                  {"adaptive": 0.5}],
    "lightkv": [{}, {"ratios": (0.25,), "windows": (3,), "layers": (0.5,)}],
    "pact": [{}, {"share": 0.5, "cutoff": 0.1, "recover": 2.0, "layer": 0.25},
             {"prop_attn": False}],
    "pixelprune": [{}, {"tolerance": 0.05, "std": 0.27}],
    "vitcop": [{"num_keep": 7, "visual": 0.5, "official": True}],
    "dynamic_llava": [{"num_keep": 7}, {"keep_ratio": 0.2, "layer": 0.5, "width": 64, "heads": 4,
                                           "text": True}],
    "keep_all": [{}],
    "tome": [{"r": 8}, {"r": (8, 4, 0), "prop_attn": False}, {"r": 8, "inflect": -1.0}],
    "pitome": [{"keep_ratio": 0.9, "margin": 0.5}],
    "evit": [{}, {"keep_ratio": 0.5, "fuse": False, "layers": (3, 0.5)}],
    "topk": [{"keep_ratio": 0.5, "layers": (2,)}, {"num_keep": 7}],
    "dynamicvit": [{"keep_ratio": 0.5}, {"num_keep": 7}],
    "spatten": [{"keep_ratio": 0.5}, {"keep_ratio": 0.7, "front": 0.3}],
    "ficoco_v": [{}, {"r": 8, "beta": 0.5, "front": 0.25}],
    "ipcv": [{}, {"keep_ratio": 0.5, "layer": 3, "attention_stabilization": 7, "top_k": 4}],
    "diffrate": [{}, {"numbers": "mae_base-11.5"}, 
                 {"pruned": (9, 4), "merged": (8, 3), "tokens": 17}],
}  # fmt: skip
AT_CACHE: dict[str, list[dict[str, Any]]] = {
    "snapkv": [{"num_keep": 7, "window": 8, "pool": "max"}, {"max_cache": 99, "scope": "prompt"}],
    "compresskv": [{"num_keep": 7, "heads": ((0, 1), (1, 0))}, {"slots": (4, 5)}],
    "prefixkv": [{"ratios": (0.5, 0.25)}, {"keep_ratio": 0.5, "scope": "prompt"}],
    "duo_attention": [{"num_keep": 7, "gates": ((0.5, 1.0), (0.0, 0.25))}],
    "vl_cache": [{"keep_ratio": 0.5, "scope": "prompt", "own_windows": True}],
    "zipvl": [{}, {"tau": 0.9, "probe": 1.0}],
    "zipcache": [{}, {"low": 0.6, "over": "probes"}],
    "think": [{}, {"ratio": 0.5, "num_keep": 7}],
}
OTHERS |= AT_CACHE
CASES = [(name, params) for name in METHODS for params in OTHERS.get(name, [{"num_keep": 7}])]


INSIDE = [name for name in METHODS if inside_only(visprune.catalog.methods.get(name))]
CACHE = [name for name in METHODS if acts_on_cache(visprune.catalog.methods.get(name))]
BEFORE = [name for name in METHODS if acts_before(visprune.catalog.methods.get(name))]


def plain(name: str) -> dict[str, Any]:
    if name == "zipvl":  # it decides itself how much stays
        return {}
    by_ratio = {"tome": {"r": 4}, "pitome": {"keep_ratio": 0.9}, "evit": {"keep_ratio": 0.7},
                "spatten": {"keep_ratio": 0.7}}  # fmt: skip
    return by_ratio.get(name, {} if name in NO_BUDGET else {"num_keep": 16})


# What decides itself how many stay, or at which layer they leave.
NO_BUDGET = (
    *("keep_all", "vtw", "diffrate", "ficoco_v", "ipcv", "ivc_prune", "sparsevlm", "lightkv"),
    *("pact", "pixelprune"),
)
# Their frames decide how the budget is met.
BY_FRAME = ("evs", "vidcom2")


def test_the_nine_methods() -> None:
    papers = ["todre", "divprune", "fastv", "pyramiddrop", "visionzip"]
    assert METHODS[:9] == [*papers, "keep_all", "random", "uniform", "pool"]


@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_method_is_the_same_again_from_its_dict(name: str, params: dict[str, Any]) -> None:
    built = visprune.get_method(name, **params, strict=True)
    stored = json.loads(json.dumps(built.to_dict()))
    assert stored["method"] == name
    again = visprune.get_method(stored.pop("method"), **stored)
    assert again == built
    assert hash(again) == hash(built)
    for key, value in params.items():
        assert getattr(again, key) == value


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_frozen_and_named(name: str) -> None:
    built = visprune.get_method(name, **plain(name))
    assert isinstance(built, PruningMethod)
    assert built.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.strict = True  # type: ignore[misc]
    assert visprune.get_method(built) is built
    assert type(built).__doc__


@pytest.mark.parametrize("name", [m for m in METHODS if m not in (*INSIDE, *CACHE, *BEFORE)])
@pytest.mark.parametrize("layers", [8, 28, 32, 40])
def test_schedules_go_down(name: str, layers: int) -> None:
    spec = ModelSpec(family="llava", num_layers=layers, has_cls=True, multi_axis_rope=False)
    stages = visprune.get_method(name, **plain(name)).schedule(spec)
    assert stages
    depths = [-1 if s.site.kind == "projector" else s.site.resolve(layers) for s in stages]
    assert depths == sorted(set(depths))
    kept = [s.budget.resolve(576) for s in stages if s.budget is not None]
    assert kept == sorted(kept, reverse=True)
    assert kept or name in (*NO_BUDGET, *BY_FRAME)
    # The budget is what survives the last selection.
    if name not in (*NO_BUDGET, *BY_FRAME):
        assert kept[-1] == 16


@pytest.mark.parametrize("layers", [2, 12, 24, 27])
@pytest.mark.parametrize("name", [*INSIDE, "random", "uniform", "keep_all"])
def test_schedules_go_down_inside_an_encoder(name: str, layers: int) -> None:
    spec = ModelSpec(family="VisionTransformer", num_layers=0, has_cls=True, multi_axis_rope=False,
                     encoder_layers=layers, encoder_width=64)  # fmt: skip
    method = visprune.get_method(name, **plain(name))
    schedule = method.schedule(spec)
    plan = make_encoder_plan(method, list(enumerate(schedule)), spec)
    depths = [stage.site.resolve(layers) for stage in schedule]
    assert depths == sorted(set(depths))
    counts = [count for pair in plan.counts(576, layers) for count in pair]
    if name == "ipcv":  # attention of some layers sees all patches
        counts = [after for _, after in plan.counts(576, layers)]
    assert counts == sorted(counts, reverse=True)
    if "num_keep" in plain(name):
        assert counts[-1] == 16
    assert (counts[-1] == 576) == (name == "keep_all")


@pytest.mark.parametrize("has_cls", [False, True])
def test_what_acts_behind_an_encoder_is_named(has_cls: bool) -> None:
    spec = ModelSpec(family="x", num_layers=8, has_cls=has_cls, multi_axis_rope=False)
    with pytest.raises(UnsupportedModel) as caught:
        make_plan(visprune.get_method("evit"), spec)
    named = str(caught.value).rpartition(": ")[2].rstrip(".").split(", ")

    def asks_for_it(name: str) -> bool:
        stages = visprune.get_method(name, **plain(name)).schedule(spec)
        return any("cls_token" in signal.requires for s in stages for signal in s.needs)

    assert named == [
        n for n in METHODS if n not in (*INSIDE, *BEFORE) and (has_cls or not asks_for_it(n))
    ]
    assert has_cls == ("visionzip" in named)
    for name in named:
        make_plan(visprune.get_method(name, **plain(name)), spec)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("evit", {"fuse": "no"}, "evit takes no fuse='no': give True or False"),
        ("evit", {"layers": 3}, "no layers=3: give a list, each an int or a fraction"),
        ("topk", {"num_keep": 4, "layers": ("a",)}, r"no layers=\('a',\): give a list"),
        ("tome", {"r": 3, "inflect": "x"}, "tome takes no inflect='x': give a number"),
        ("tome", {"r": 3, "prop_attn": 2}, "no prop_attn=2: give True or False"),
        ("pitome", {"keep_ratio": 0.9, "margin": None}, "no margin=None: give a number"),
        ("random", {"num_keep": 4, "seed": "a"}, "random takes no seed='a': give an int"),
        ("random", {"num_keep": 4, "seed": 1.5}, "no seed=1.5: give an int"),
        ("todre", {"num_keep": 4, "tau": "a"}, "no tau='a': give a number"),
        ("todre", {"num_keep": 4, "stage1": "a"}, "no stage1='a': give True or False"),
        ("pyramiddrop", {"num_keep": 4, "depths": 0.5}, "no depths=0.5: give a list, each a num"),
        ("pyramiddrop", {"num_keep": 4, "factor": "a"}, "no factor='a': give a number"),
        ("visionzip", {"num_keep": 4, "contextual": "a"}, "no contextual='a': give an int or None"),
        ("fastv", {"num_keep": 4, "layer": "2"}, "no layer='2': give an int or a fraction"),
        ("uniform", {"num_keep": 4, "strict": "yes"}, "no strict='yes': give True or False"),
    ],
)
def test_values_of_another_type(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visprune.get_method(name, **params)


def test_values_of_another_type_in_a_built_method() -> None:
    built = visprune.catalog.methods.get("random")(num_keep=4, seed="a")
    with pytest.raises(ConfigError, match="random takes no seed='a': give an int"):
        visprune.get_method(built)


SHORT = ("tome", "evit")  # less a letter, they are others' names


@pytest.mark.parametrize("name", [m for m in METHODS if m not in (*NO_BUDGET, *SHORT)])
def test_a_wrong_name_says_which_is_meant(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{name}'"):
        visprune.get_method(name[:-1], num_keep=4)
    with pytest.raises(ConfigError, match=r"no parameter 'keep_ration'. Did you mean 'keep_ratio'"):
        visprune.get_method(name, keep_ration=0.5)


def test_a_method_on_a_shallow_model_merges_its_stages() -> None:
    spec = ModelSpec(family="llava", num_layers=2, has_cls=True, multi_axis_rope=False)
    stages = visprune.get_method("pyramiddrop", num_keep=16).schedule(spec)
    assert [stage.site.resolve(2) for stage in stages] == [1]
    assert stages[-1].budget.resolve(576) == 16
