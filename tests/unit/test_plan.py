# SPDX-License-Identifier: Apache-2.0
"""A schedule is resolved and checked before anything runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest

import visprune
from visprune.core.budget import Budget, Schedule, Stage, StepBudget
from visprune.core.method import ModelSpec, PruningMethod
from visprune.core.signals import (
    ClsAttention,
    EncoderKeys,
    Fingerprint,
    HiddenStates,
    LastQueryAttention,
)
from visprune.core.site import Site
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.plan import make_plan

LLAVA = ModelSpec(family="llava", num_layers=32, has_cls=True, multi_axis_rope=False)
QWEN = ModelSpec(family="qwen2_vl", num_layers=28, has_cls=False, multi_axis_rope=True)


@dataclass(frozen=True, kw_only=True)
class Made(PruningMethod):
    """A method with given stages."""

    name: ClassVar[str] = "made"
    stages: Schedule = ()

    def schedule(self, spec: ModelSpec) -> Schedule:
        return self.stages


HALF = Budget(keep_ratio=0.5)


def test_stages_are_placed_in_order() -> None:
    plan = make_plan(visprune.get_method("todre", num_keep=64), LLAVA)
    assert [number for number, _ in plan.projector_stages] == [0]
    numbers = {layer: [n for n, _ in found] for layer, found in plan.decoder_stages.items()}
    assert numbers == {28: [1]}
    assert (list(plan.previous), plan.own) == ([27], set())
    assert plan.encoder_signals == [ClsAttention("last")]
    plan = make_plan(visprune.get_method("pyramiddrop", num_keep=64), QWEN)
    assert list(plan.decoder_stages) == [7, 14, 21]
    assert plan.previous == {}  # it reads the layer's own projections
    assert plan.own == {7, 14, 21}


def test_signals_are_asked_for_where_they_are() -> None:
    plan = make_plan(visprune.get_method("visionzip", num_keep=64), LLAVA)
    assert (
        plan.encoder_signals == plan.required == [ClsAttention("feature"), EncoderKeys("feature")]
    )
    plan = make_plan(visprune.get_method("random", num_keep=64), QWEN)
    assert plan.picture_signals == [Fingerprint()]
    # ToDRE takes the class token where there is one.
    plan = make_plan(visprune.get_method("todre", num_keep=64), LLAVA)
    assert (plan.encoder_signals, plan.required) == ([ClsAttention("last")], [])
    assert make_plan(visprune.get_method("todre", num_keep=64), QWEN).encoder_signals == []
    with pytest.raises(UnsupportedModel, match=r"visionzip .*qwen2_vl has no class token"):
        make_plan(visprune.get_method("visionzip", num_keep=64), QWEN)


@pytest.mark.parametrize(
    ("rule", "spec", "want"),
    [(None, LLAVA, "compact"), ("original", LLAVA, "original"), ("compact", LLAVA, "compact"),
     (None, QWEN, "original"), ("original", QWEN, "original")],
)  # fmt: skip
def test_positions(rule: str | None, spec: ModelSpec, want: str) -> None:
    method = visprune.get_method("divprune", num_keep=4, positions=rule)
    assert make_plan(method, spec).positions == want


def test_positions_that_a_model_cannot_have() -> None:
    with pytest.raises(ConfigError, match=r"qwen2_vl gives tokens \(t, h, w\) places"):
        make_plan(visprune.get_method("uniform", num_keep=4, positions="compact"), QWEN)


def test_sites_that_are_not_offered() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        make_plan(Made(stages=(Stage(Site.cache(), HALF),)), LLAVA)
    assert "cache" in str(caught.value)
    assert "encoder(layer) inside some, projector, decoder(layer), cache" in str(caught.value)
    closed = dataclasses.replace(LLAVA, encoder_refusal="its windows need every patch")
    with pytest.raises(UnsupportedModel, match=r"its windows need every patch. Methods that fit"):
        make_plan(Made(stages=(Stage(Site.encoder(3), HALF),)), closed)


def test_the_site_inside_an_encoder() -> None:
    spec = dataclasses.replace(LLAVA, encoder_layers=6)
    sites = [Site.encoder(3), Site.encoder(0.5, after_attention=True)]
    plan = make_plan(Made(stages=tuple(Stage(site, HALF) for site in sites)), spec)
    assert (list(plan.encoder.entry), list(plan.encoder.inside)) == ([3], [3])
    assert plan.encoder.counts(100, 6) == [(100, 100)] * 3 + [(50, 50)] * 3
    early = Stage(Site.encoder(3), HALF, (ClsAttention("own"),))
    with pytest.raises(ConfigError, match=r"its attention has not run. Use after_attention=True"):
        make_plan(Made(stages=(early,)), spec)
    with pytest.raises(ConfigError, match="only a site inside an encoder or"):
        make_plan(Made(stages=(Stage(Site.projector(), StepBudget(num_drop=2)),)), spec)


def test_needs_that_cannot_be_met() -> None:
    previous = (LastQueryAttention(),)
    with pytest.raises(ConfigError, match="not there yet at the projector"):
        make_plan(Made(stages=(Stage(Site.projector(), HALF, previous),)), LLAVA)
    with pytest.raises(ConfigError, match=r"layer 0 has none before it. Use layer 1 to 31"):
        make_plan(Made(stages=(Stage(Site.decoder(0), HALF, previous),)), LLAVA)
    twice = (
        Stage(Site.decoder(2), HALF, previous),
        Stage(Site.decoder(2), HALF, (HiddenStates(),)),
    )
    plan = make_plan(Made(stages=twice), LLAVA)
    assert (plan.previous, plan.states) == ({1: [twice[0]]}, {1: [twice[1]]})
    with pytest.raises(ConfigError, match="a layer of its own is what only a site"):
        make_plan(Made(stages=(Stage(Site.projector(), HALF, (ClsAttention("own"),)),)), LLAVA)
    with pytest.raises(ConfigError, match="decoder layer 32 does not exist"):
        make_plan(Made(stages=(Stage(Site.decoder(32), HALF),)), LLAVA)
    own = (LastQueryAttention("own"),)
    plan = make_plan(Made(stages=(Stage(Site.decoder(0), HALF, own),)), LLAVA)
    assert list(plan.decoder_stages) == [0]
