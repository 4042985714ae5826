# SPDX-License-Identifier: Apache-2.0
"""Operations of the generic families against torch's own counter, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.families import tiny
from visprune.backbones.vlm.generic import COUNTED
from visprune.errors import UnsupportedModel

# The counter knows no formula for kernels of attention or of grouped experts: eager has none.


@pytest.mark.parametrize("family", COUNTED)
@torch.no_grad()
def test_operations_are_those_that_run(family: str) -> None:
    model, inputs = tiny.build(family, attn="eager"), tiny.inputs(family, [[3, "a", 6, "B", 2]])
    if family.endswith("_moe"):
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1, use_cache=False)
    with visprune.prune(model, "keep_all") as run:
        model(**inputs)
        cost = run.cost(causal="dense")
    assert cost.macs == counter.get_total_flops() // 2
    assert cost.vision > 0
    assert cost.projector > 0
    with visprune.prune(model, "random", num_keep=3) as run:
        model(**inputs)
        assert run.cost().prefill < cost.prefill


@pytest.mark.parametrize("family", ["mistral3", "kimi_k25", "aria"])
@torch.no_grad()
def test_what_was_not_compared_is_not_told(family: str, models: Any) -> None:
    model = models(family)
    with visprune.prune(model, "random", num_keep=3) as run:
        model(**tiny.inputs(family, [[3, "a", 6]]))
        with pytest.raises(UnsupportedModel, match="has not been compared"):
            run.cost()
