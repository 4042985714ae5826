# SPDX-License-Identifier: Apache-2.0
"""Operations of the generic families against torch's own counter, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.families import tiny
from visprune.backbones.vlm.known import COUNTED
from visprune.errors import UnsupportedModel
from visprune.machine.find import find_adapter

# The counter knows no formula for kernels of attention or of grouped experts: eager has none.


# Their encoders take all pictures as one sequence and hide them from each other: a counter of
# matrix products sees the whole square, and the padding of smaller pictures.
PACKED = ("mistral3", "lighton_ocr", "hyperclovax_vision_v2", "video_llama_3")
EXPERTS = ("qwen3_vl_moe", "glm4v_moe", "kimi_k25", "qwen3_omni_moe_thinker")


@pytest.mark.parametrize("family", COUNTED)
@torch.no_grad()
def test_operations_are_those_that_run(family: str) -> None:
    model = tiny.build(family, attn="eager")
    inputs = tiny.inputs(family, [[3, "A", 6, *([] if family in PACKED else ["B", 2])]])
    if family in EXPERTS:
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        last = {} if find_adapter(model).heads_all else {"logits_to_keep": 1}
        model(**inputs, **last, use_cache=False)
    with visprune.prune(model, "keep_all") as run:
        model(**inputs)
        cost = run.cost(causal="dense")
    assert cost.macs == counter.get_total_flops() // 2
    assert cost.vision > 0
    assert cost.projector > 0
    with visprune.prune(model, "random", num_keep=3) as run:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, **last, use_cache=False)
        pruned = run.cost(causal="dense")
    # Of the random order of tokens nothing is a product of matrices.
    assert pruned.macs - pruned.selection == counter.get_total_flops() // 2
    assert pruned.prefill < cost.prefill


@pytest.mark.parametrize("family", ["deepseek_vl_hybrid", "aria", "emu3"])
@torch.no_grad()
def test_what_was_not_compared_is_not_told(family: str, models: Any) -> None:
    model = models(family)
    with visprune.prune(model, "random", num_keep=3) as run:
        model(**tiny.inputs(family, [[3, "a", 6]]))
        with pytest.raises(UnsupportedModel, match="has not been compared"):
            run.cost()
