# SPDX-License-Identifier: Apache-2.0
"""With r = 0 or keep_ratio = 1 every configuration that timm registers is bit for bit itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.encoders import small
from visprune.core import ModelSpec
from visprune.errors import UnsupportedModel
from visprune.machine.plan import fitting

EVERYTHING: dict[str, dict[str, Any]] = {
    "tome": {"r": 0},
    "pitome": {"keep_ratio": 1.0},
    "evit": {"keep_ratio": 1.0},
    "topk": {"keep_ratio": 1.0},
    "dynamicvit": {"keep_ratio": 1.0},
    "random": {"keep_ratio": 1.0},
    "spatten": {"keep_ratio": 1.0},
    "diffrate": {"pruned": [197] * 2, "merged": [197] * 2},
    "ficoco_v": {"r": 0},
    "ipcv": {"keep_ratio": 1.0},
    "uniform": {"keep_ratio": 1.0},
    "keep_all": {},
}
BY_CLASS = ("evit", "topk", "diffrate", "ficoco_v")


def test_every_method_for_encoders_is_here() -> None:
    vit = ModelSpec("VisionTransformer", 0, True, False, encoder_layers=12, encoder_width=64)
    assert set(fitting(vit)) == set(EVERYTHING)


def test_every_registered_configuration_is_here() -> None:
    assert len(small.NAMES) >= 250
    assert set(small.KINDS.values()) <= set(small.NAMES)


@pytest.mark.parametrize("name", small.NAMES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(name: str) -> None:
    model = small.shrunk(name)
    x = small.picture(model, batch=1)
    want = model(x)
    assert bool(torch.isfinite(want).all())
    for method in EVERYTHING if name in small.KINDS.values() else ("tome", "evit"):
        try:
            run = visprune.prune(model, method, **EVERYTHING[method])
        except UnsupportedModel as error:
            assert method in BY_CLASS
            differential = "differential" in str(error)
            assert differential or model.cls_token is None
            continue
        with run:
            got = model(x)
            stages, layers = run.trace.stages, len(model.blocks)
        assert torch.equal(got, want), method
        # The whole path ran: selections, gathers, states.
        once = ("evit", "topk", "dynamicvit", "random", "uniform", "ficoco_v", "ipcv")
        assert len(stages) == (1 if method in once else 2)
        assert layers == 2
        assert all(stage["before"] == stage["after"] for stage in stages)
    # Guards the above: the configuration does change once tokens merge.
    with visprune.prune(model, "tome", r=2):
        assert not torch.equal(model(x), want)
    assert torch.equal(model(x), want)
