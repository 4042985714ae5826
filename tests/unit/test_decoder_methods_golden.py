# SPDX-License-Identifier: Apache-2.0
"""Methods inside the decoder against stored outputs of the official implementations."""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.golden_cases import cases, tensors, visual
from visprune.core.method import Context, ModelSpec
from visprune.core.signals import (
    FinalNormStates,
    HiddenStates,
    Slots,
    TextSlots,
    TextStates,
)
from visprune.methods.dart import DART, KeyNorms
from visprune.methods.v2drop import V2Drop

SPEC = ModelSpec(family="llava", num_layers=32, has_cls=True, multi_axis_rope=False)
QWEN = ModelSpec(family="qwen2_vl", num_layers=28, has_cls=False, multi_axis_rope=True)


@cases("v2drop")
def test_v2drop(case: dict[str, Any]) -> None:
    t, p = tensors("v2drop", case), case["params"]
    start, end, length = p["image_start"], p["image_start"] + p["n"], p["image_start"] + p["n"] + 20
    method = V2Drop()
    stages = {s.site.resolve(28): s for s in method.schedule(QWEN)}
    assert sorted(stages) == [3, 16, 22]
    budget = stages[p["layer"]].budget
    assert budget is not None
    ctx = Context(
        num_keep=budget.resolve(p["n"], 1000),
        signals={HiddenStates(): t["previous"][:, start:end]},
    )
    index = method.select(visual(t["current"][:, start:end]), ctx).index[0]
    whole = torch.cat([torch.arange(start), index + start, torch.arange(end, length)])
    assert torch.equal(whole, t["keep"])


@cases("dart")
def test_dart(case: dict[str, Any]) -> None:
    t, p = tensors("dart", case), case["params"]
    start, n, after = p["image_start"], p["n"], p["text_after"]
    image, text = slice(start, start + n), torch.arange(start + n, start + n + after)[None]
    states = t["hidden"]
    signals = {
        KeyNorms(): t["keys"].abs().sum((1, 3)),
        Slots(): torch.arange(start, start + n)[None],
        TextSlots(): text,
        FinalNormStates(): states[:, image],
        TextStates(which="after_image", normed=True): states[:, text[0]],
    }
    ratio = 1 - p["reduction_ratio"]
    common: dict[str, Any] = {"pivot_image": p["pivot_image"], "pivot_text": p["pivot_text"]}
    method = DART(keep_ratio=ratio, official=True, **common)
    (stage,) = method.schedule(SPEC)
    assert stage.site.resolve(32) == 2
    ctx = Context(num_keep=stage.budget.resolve(n), signals=signals)  # type: ignore[union-attr]
    index = method.select(visual(states[:, image]), ctx).index[0]
    assert torch.equal(index + start, t["kept"])
    assert len(index) == p["kept"]
    # Without the official arithmetic exactly the budget stays, the pivots among it.
    method = DART(num_keep=128 if n > 200 else 40, **common)
    ctx = Context(num_keep=method.num_keep or 0, signals=signals)
    index = method.select(visual(states[:, image]), ctx).index[0]
    assert len(index) == method.num_keep
    norm = t["keys"].abs().sum((1, 3))[0, image]
    assert set(norm.topk(p["pivot_image"]).indices.tolist()) <= set(index.tolist())
