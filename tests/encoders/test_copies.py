# SPDX-License-Identifier: Apache-2.0
"""A copy of a pruned model is pruned by itself: nothing of it reaches the original."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

import visprune
from tests import tiny
from tests.contract.cases import batch
from tests.encoders import small
from tests.encoders.test_elsewhere import answer
from tests.encoders.test_elsewhere import built as clip
from tests.encoders.test_open_clip import pixels, tower
from tests.encoders.test_reduction import ALL, hooks
from visprune.errors import ConfigError

KINDS = ["plain", "side_by_side", "two_in_parallel", "siglip", "eva_rope", "mixed_rope"]


def changed(model: Any) -> None:
    """Other weights: what still reads them gives another answer."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


# These models have two layers, and diffrate's numbers there are one for each of four.
EVERY = [(method, {} if method == "diffrate" else params) for method, params in ALL]
CASES = [
    (kind, method, params)
    for kind in KINDS
    for method, params in EVERY
    if kind != "siglip" or method not in ("topk", "evit", "diffrate", "ficoco_v")  # no class token
]


@pytest.mark.parametrize(("kind", "method", "params"), CASES)
def test_a_copy_is_pruned_by_itself(kind: str, method: str, params: dict[str, Any]) -> None:
    model = small.shrunk(small.KINDS[kind])
    x = small.picture(model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    run = visprune.prune(model, method, **params)
    want, kept = model(x), torch.stack(run.kept)  # with gradients, which a copy has no part in
    other_run = copy.deepcopy(run)
    other = other_run.adapter.model
    assert other is not model
    with pytest.raises(ConfigError, match="Nothing has run"):
        _ = other_run.kept
    changed(model)
    latest = run._reducer.latest
    assert torch.equal(other(x), want)
    assert torch.equal(torch.stack(other_run.kept), kept)
    assert run._reducer.latest is latest
    with pytest.raises(ConfigError, match=r"already pruned by.*visprune\.remove\(model\)"):
        visprune.prune(copy.deepcopy(other), "tome", r=1)
    run.remove()
    assert torch.equal(other(x), want)
    other_run.remove()
    assert all(not found for module in other.modules() for found in hooks(module))
    assert {name: set(vars(module)) for name, module in other.named_modules()} == before


@pytest.mark.parametrize("kind", ["plain", "eva_rope"])
@pytest.mark.parametrize(("method", "params"), EVERY)
def test_a_model_that_was_stored_whole(kind: str, method: str, params: dict[str, Any]) -> None:
    model = small.shrunk(small.KINDS[kind])
    x = small.picture(model)
    with visprune.prune(model, method, **params):
        want = model(x)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)


@pytest.mark.parametrize(("method", "params"), [("tome", {"r": 3}), ("evit", {"keep_ratio": 0.6})])
def test_an_average_of_weights(method: str, params: dict[str, Any]) -> None:
    model = small.shrunk(small.KINDS["plain"])
    x = small.picture(model)
    with visprune.prune(model, method, **params):
        ema = ModelEmaV3(model, decay=0.5)
        changed(model)
        ema.update(model)
        with torch.no_grad():
            got = ema.module(x)
            model.load_state_dict(ema.module.state_dict())
            assert torch.equal(got, model(x))


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
@pytest.mark.parametrize("method", ["tome", "topk", "uniform", "dynamicvit"])
@torch.no_grad()
def test_other_libraries(kind: str, method: str) -> None:
    if kind == "clip":
        model, x = clip("clip"), torch.randn(2, 3, 32, 32)
    else:
        model, x = copy.deepcopy(tower("plain")), pixels()

    def read(module: Any) -> Tensor:
        return answer(module, x) if kind == "clip" else module(x)

    params = {"r": 3} if method == "tome" else {"keep_ratio": 0.6}
    with visprune.prune(model, method, **params):
        want = read(model)
        others = [copy.deepcopy(model)]
        if kind == "open_clip":  # transformers' own hooks cannot be pickled
            others.append(pickle.loads(pickle.dumps(model)))
    changed(model)
    for other in others:
        assert torch.equal(read(other), want)


@pytest.mark.parametrize(
    ("method", "params"),
    [("random", {"num_keep": 5}), ("visionzip", {"num_keep": 5}), ("fastv", {"num_keep": 5}),
     ("tome", {"r": 3})],
)  # fmt: skip
@torch.no_grad()
def test_a_vision_language_model(method: str, params: dict[str, Any]) -> None:
    model, inputs = tiny.build("llava"), batch("llava")
    with visprune.prune(model, method, **params) as run:
        want, trace = model(**inputs).logits, run.trace
        other = copy.deepcopy(model)
        changed(model)
        assert torch.equal(other(**inputs).logits.nan_to_num(), want.nan_to_num())
        assert run.trace is trace
