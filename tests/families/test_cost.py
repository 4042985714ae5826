# SPDX-License-Identifier: Apache-2.0
"""Operations of the generic families against torch's own counter, or refused."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.contract.oracle import error
from tests.families import tiny
from visprune.backbones.vlm.known import COUNTED, FIRST, KNOWN, UNCOUNTED
from visprune.errors import UnsupportedModel
from visprune.machine.find import find_adapter

# The counter knows no formula for kernels of attention or of grouped experts: eager has none.


# Their encoders take all pictures as one sequence and hide them from each other: a counter of
# matrix products sees the whole square, and the padding of smaller pictures.
PACKED = ("mistral3", "lighton_ocr", "hyperclovax_vision_v2", "video_llama_3")
EXPERTS = (
    *("qwen3_vl_moe", "glm4v_moe", "kimi_k25", "qwen3_omni_moe_thinker", "qwen3_5_moe"),
    *("muse_spark", "step3p7"),
)
CLIPS = [name for name in COUNTED if tiny.FAMILIES[name].clip]
# E2B and E4B, whose later layers run for the last token alone.
ALL = (*COUNTED, "gemma4_small")


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **more: Any
) -> tuple[Tensor, None]:
    """The gated delta rule token by token, of products that a counter sees, ``[B, S, H, d]``."""
    shared = value.shape[2] // key.shape[2]
    query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query, key = (x.repeat_interleave(shared, 2) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    state = value.new_zeros(len(value), value.shape[2], key.shape[-1], value.shape[-1])
    out = torch.empty_like(value)
    for token in range(value.shape[1]):
        state = state * g[:, token].exp()[..., None, None]
        known = (key[:, token, :, None] @ state)[..., 0, :]
        missing = (value[:, token] - known) * beta[:, token][..., None]
        state = state + key[:, token, ..., None] @ missing[..., None, :]
        out[:, token] = (query[:, token, :, None] @ state)[..., 0, :]
    return out, None


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **more: Any,
) -> Tensor:
    """A causal convolution of each channel, of the tokens there are and none behind them."""
    x = F.pad(x, (weight.shape[-1] - 1, 0))
    out = F.conv1d(x, weight[:, None], bias, groups=len(weight))
    return out if activation is None else F.silu(out)


def pooled(
    self: Any, hidden_states: Tensor, pixel_position_ids: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Gemma 4's means over blocks of patches, which it writes as a product with zeros and ones."""
    batch, count, width = hidden_states.shape
    side = math.isqrt(count // length)
    x, y = pixel_position_ids.clamp(min=0).unbind(-1)
    block = x // side + (x.amax(-1, keepdim=True) + 1) // side * (y // side)
    out = hidden_states.new_zeros(batch, length, width)
    out.scatter_add_(1, block[..., None].expand_as(hidden_states), hidden_states / side**2)
    return out, torch.zeros(batch, length, dtype=torch.bool).scatter(1, block, True)


@contextmanager
def countable(model: Any) -> Iterator[None]:
    """Recurrent layers by their definition, in place of kernels that work in chunks; means."""
    own = {"torch_chunk_gated_delta_rule": delta_rule, "causal_conv1d_fn": convolved}
    layers = find_adapter(model).layers
    with pytest.MonkeyPatch.context() as patch:
        for module in {sys.modules[type(layer).__module__] for layer in layers}:
            for name, made in own.items():
                if hasattr(module, name):
                    patch.setattr(module, name, made)
        for kind in {type(part) for part in model.modules()}:
            if hasattr(kind, "_avg_pool_by_positions"):
                patch.setattr(kind, "_avg_pool_by_positions", pooled)
        for part in model.modules():
            if hasattr(part, "fused_attn"):  # of timm
                patch.setattr(part, "fused_attn", False)
        yield


@pytest.mark.parametrize("family", [name for name in COUNTED if tiny.FAMILIES[name].recurrent])
@torch.no_grad()
def test_recurrent_layers_by_their_definition_are_those_of_the_model(family: str) -> None:
    model, inputs = tiny.build(family, attn="eager"), tiny.inputs(family, [[3, "A", 6]])
    plain = model(**inputs, use_cache=False).logits
    with countable(model):
        made = model(**inputs, use_cache=False).logits
    assert family.startswith("lfm") or not torch.equal(made, plain)  # others ran
    assert error(made, plain) < 1e-4


def counting(family: str) -> Any:
    """A tiny model whose operations torch's counter sees."""
    model = tiny.build(family, attn="eager")
    if family in EXPERTS:
        model.set_experts_implementation("eager")
    return model


def seen(model: Any, inputs: dict[str, Any]) -> int:
    """Multiply-adds of a forward by torch's counter, with the head on what it is needed for."""
    last = {} if find_adapter(model).heads_all else {"logits_to_keep": 1}
    with countable(model), FlopCounterMode(display=False) as counter:
        model(**inputs, **last, use_cache=False)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_operations_are_those_that_run(family: str) -> None:
    model = counting(family)
    inputs = tiny.inputs(family, [[3, "A", 6, *([] if family in PACKED else ["b", 2])]])
    with visprune.prune(model, "keep_all") as run:
        model(**inputs)
        cost = run.cost(causal="dense")
    assert cost.macs == seen(model, inputs)
    assert cost.vision > 0
    assert cost.projector > 0
    with visprune.prune(model, "random", num_keep=3) as run:
        counted = seen(model, inputs)
        pruned = run.cost(causal="dense")
    # Of the random order of tokens nothing is a product of matrices.
    assert pruned.macs - pruned.selection == counted
    assert pruned.prefill < cost.prefill


@pytest.mark.parametrize("family", ["deepseek_vl_hybrid", "minicpmv4_6", "emu3"])
@torch.no_grad()
def test_what_was_not_compared_is_not_told_and_why(family: str, models: Any) -> None:
    model = models(family)
    with visprune.prune(model, "random", num_keep=3) as run:
        model(**tiny.inputs(family, [[3, "a", 6]]))
        with pytest.raises(UnsupportedModel, match=re.escape(UNCOUNTED[family])):
            run.cost()


@pytest.mark.parametrize("family", CLIPS)
@torch.no_grad()
def test_operations_of_a_clip(family: str) -> None:
    model, inputs = counting(family), tiny.inputs(family, [[3, "v", 6]])
    with visprune.prune(model, "keep_all") as run:
        model(**inputs)
        assert run.cost(causal="dense").macs == seen(model, inputs)


def test_every_family_is_counted_or_has_a_reason() -> None:
    assert {*FIRST, *COUNTED, *UNCOUNTED} == set(KNOWN)
    assert len(FIRST) + len(COUNTED) + len(UNCOUNTED) == len(KNOWN)


def test_a_convolution_that_pools_frames_alone_is_refused() -> None:
    model = tiny.build("llava_next_video")
    model.model.vision_resampler.pool = nn.Conv2d(24, 24, 2, 2)
    with pytest.raises(UnsupportedModel, match="pools frames by a Conv2d"):
        find_adapter(model).cost_shape()


@torch.no_grad()
def test_tokens_that_leave_behind_a_projection_are_refused(models: Any) -> None:
    with visprune.prune(models("gemma4_small"), "random_deep", num_keep=3, layer=0) as run:
        models("gemma4_small")(**tiny.inputs("gemma4_small", [[3, "a", 6]]))
        with pytest.raises(UnsupportedModel, match="projects tokens before its first layer"):
            run.cost()
