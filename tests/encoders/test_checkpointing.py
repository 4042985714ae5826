# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing changes no gradient of a reduced encoder, in either of its modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import visprune
from tests import tiny
from tests.encoders import small

METHODS = [
    ("tome", {"r": 2}),
    ("pitome", {"keep_ratio": 0.8}),
    ("evit", {"keep_ratio": 0.7}),
    ("topk", {"keep_ratio": 0.7}),
    ("random", {"keep_ratio": 0.7}),
]
methods = pytest.mark.parametrize(("method", "params"), METHODS, ids=lambda x: str(x)[:8])
modes = pytest.mark.parametrize("reentrant", [True, False])
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "image_size": 24, "patch_size": 4}  # fmt: skip


def alone(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SIZES))
    return SiglipVisionModel(SiglipVisionConfig(**SIZES))


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert torch.allclose(got[name], grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@methods
@modes
def test_an_encoder_of_transformers(
    kind: str, method: str, params: dict[str, Any], reentrant: bool
) -> None:
    if kind == "siglip" and method in ("evit", "topk"):
        return  # they want a class token
    model = alone(kind).train()
    pixels = torch.randn(2, 3, 24, 24, requires_grad=True)
    with visprune.prune(model, method, **params) as run:
        model(pixel_values=pixels).last_hidden_state.square().sum().backward()
        want, kept = gradients(model), run.kept
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model(pixel_values=pixels).last_hidden_state.square().sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(run.kept, kept, strict=True))
    assert len(want) > 30
    same(gradients(model), want)


@methods
@modes
def test_inside_a_vision_language_model(
    method: str, params: dict[str, Any], reentrant: bool
) -> None:
    model = tiny.build("llava").train()
    inputs = tiny.inputs("llava", [[2, "a", 6]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, -100)
    with visprune.prune(model, method, **params):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        want = gradients(model)
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model.enable_input_require_grads()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    same(gradients(model), want)
    assert any("vision_tower.encoder.layers.0" in name for name in want)


@methods
@modes
def test_an_encoder_of_timm(method: str, params: dict[str, Any], reentrant: bool) -> None:
    model = small.shrunk(small.KINDS["plain"]).train()
    x = small.picture(model).requires_grad_()
    with visprune.prune(model, method, **params):
        model(x).square().sum().backward()
        want = gradients(model)
        model.set_grad_checkpointing(True)
        model(x).square().sum().backward()
        same(gradients(model), want)
        # By hand, in the mode that timm does not take.
        model.set_grad_checkpointing(False)
        y = model.norm_pre(model.pos_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks:
            y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=reentrant)
        model.forward_head(model.norm(y)).square().sum().backward()
        same(gradients(model), want)


@methods
def test_two_forwards_before_a_backward(method: str, params: dict[str, Any]) -> None:
    model = small.shrunk(small.KINDS["plain"]).train()
    torch.manual_seed(1)
    a, b = (torch.randn_like(small.picture(model)).requires_grad_() for _ in range(2))
    with visprune.prune(model, method, **params):
        (model(a).square().sum() + 2 * model(b).square().sum()).backward()
        want = gradients(model)
        model.set_grad_checkpointing(True)
        (model(a).square().sum() + 2 * model(b).square().sum()).backward()
    same(gradients(model), want)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_hooks_and_hidden_states_see_the_real_input(kind: str) -> None:
    model, pixels = alone(kind).eval(), torch.randn(2, 3, 24, 24)
    whole = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    for params in ({"r": 0}, {"r": 3}):
        with visprune.prune(model, "tome", **params):
            states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert torch.equal(states[0], whole[0])
        widths = [state.shape[1] for state in states]
        assert widths == [whole[0].shape[1] - params["r"] * n for n in range(len(widths))]
        if params["r"] == 0:
            assert all(torch.equal(x, y) for x, y in zip(states, whole, strict=True))
