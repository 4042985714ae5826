# SPDX-License-Identifier: Apache-2.0
"""A reduced encoder exports with any number of pictures in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.utils import AttentionExtract

import visprune
from tests.encoders import oracle, small
from visprune.errors import UnsupportedModel


@pytest.mark.parametrize(
    ("kind", "method", "params"),
    [
        ("plain", "uniform", {"keep_ratio": 0.6}),
        ("plain", "topk", {"keep_ratio": 0.6}),
        ("plain", "evit", {"keep_ratio": 0.6}),
        ("plain", "tome", {"r": 3}),
        ("plain", "dynamicvit", {"keep_ratio": 0.6}),
        ("plain", "keep_all", {}),
        ("plain", "random", {"keep_ratio": 0.6}),
        ("plain", "spatten", {"keep_ratio": 0.6}),
        ("plain", "diffrate", {}),
        ("plain", "ficoco_v", {"r": 3}),
        ("plain", "ipcv", {"keep_ratio": 0.4, "attention_stabilization": 1}),
        ("eva_rope", "tome", {"r": 3}),
        ("average_no_class", "pitome", {"keep_ratio": 0.8}),
    ],
)
@torch.no_grad()
def test_the_batch_is_free(kind: str, method: str, params: dict[str, Any]) -> None:
    torch.manual_seed(0)  # of new predictors, whose scores lie close together
    model = small.small(small.KINDS[kind], 2)
    shapes = ({0: torch.export.Dim("pictures", max=64)},)
    with visprune.prune(model, method, **params):
        program = torch.export.export(model, (small.picture(model),), dynamic_shapes=shapes)
        five = small.picture(model, batch=5)
        oracle.assert_close(program.module()(five), model(five))


def test_fx_is_refused_in_a_sentence() -> None:
    model = small.small(small.KINDS["plain"], 2)
    with visprune.prune(model, "tome", r=3):
        with pytest.raises(UnsupportedModel, match=r"torch.fx traces .* run\.remove\(\)"):
            torch.fx.symbolic_trace(model)
        with pytest.raises(UnsupportedModel, match="method='hook'"):
            AttentionExtract(model, method="fx")


def test_scripting_is_refused_in_a_sentence() -> None:
    model = small.small(small.KINDS["plain"], 2)
    with (
        visprune.prune(model, "tome", r=3),
        pytest.raises(
            UnsupportedModel, match=r"TorchScript cannot compile .* torch\.export.* run\.remove\(\)"
        ),
    ):
        torch.jit.script(model)
    assert not hasattr(model, "__prepare_scriptable__")
