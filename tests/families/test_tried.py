# SPDX-License-Identifier: Apache-2.0
"""A family that has no row in the registry: tried, checked on its first prompt, or refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import visprune
from tests.contract.oracle import alive, assert_close, forwards
from tests.families import tiny
from tests.families.oracle import hidden_logits
from visprune.catalog import model_names
from visprune.errors import ConfigError, UnsupportedModel


class HouseConfig(tf.InternVLConfig):
    """A family of someone's own: InternVL under another name."""

    model_type = "house_vl"


class HouseForConditionalGeneration(tf.InternVLForConditionalGeneration):
    config_class = HouseConfig


def house(attn: str = "sdpa") -> Any:
    like = tiny.build("internvl")
    torch.manual_seed(0)
    config = {k: v for k, v in like.config.to_dict().items() if k != "model_type"}
    model = HouseForConditionalGeneration(HouseConfig(**config)).eval()
    model.load_state_dict(like.state_dict())
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    return model


def prompt(*rows: list[Any]) -> dict[str, Any]:
    return tiny.inputs("internvl", list(rows or [[3, "a", 6]]))


def tried(model: Any, method: str = "random", **params: Any) -> visprune.Run:
    with pytest.warns(UserWarning, match="house_vl is no family that visprune was proved on"):
        return visprune.prune(model, method, **(params or {"num_keep": 3}))


@torch.no_grad()
def test_it_is_checked_once_and_then_pruned() -> None:
    model, inputs = house(), prompt([3, "a", 6], [2, "b", 4, "C", 3], [5])
    plain = model(**inputs).logits
    with tried(model) as run, forwards() as seen:
        assert run.adapter.spec.family == "house_vl"
        logits = model(**inputs).logits
        checks = len(seen)
        assert checks > 4  # the check's own, and this one
        assert torch.equal(model(**inputs).logits, logits)
        assert len(seen) == checks + 1  # checked once
        assert [len(kept) for kept in run.trace.kept] == [3] * 7  # of each tile: nothing joins them
    want = hidden_logits(house("eager"), inputs, alive(seen[-1]))
    there = alive(seen[-1])[-1] & inputs["attention_mask"].bool()
    assert_close(logits[there], want[there])
    assert torch.equal(model(**inputs).logits, plain)
    assert not [name for name in ("forward", "generate") if name in vars(model)]
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_generate_is_checked_before_it_encodes() -> None:
    model, inputs = house(), prompt()
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": list(range(86, 100))}
    with tried(model) as run:
        first = model.generate(**inputs, **options)
        assert len(run.trace.kept[0]) == 3
        assert torch.equal(model.generate(**inputs, **options), first)


@torch.no_grad()
def test_text_alone_needs_no_check_and_waits_for_none() -> None:
    model, inputs = house(), prompt()
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    with tried(model) as run, forwards() as seen:
        model(**text)
        assert not seen
        model(**inputs)
        assert seen
        assert len(run.trace.kept[0]) == 3


@torch.no_grad()
def test_pictures_that_come_encoded_wait_for_a_checked_prompt() -> None:
    model, inputs = house(), prompt()
    pixels = inputs.pop("pixel_values")
    with tried(model):
        features = model.get_image_features(pixel_values=pixels, return_dict=True)
        with pytest.raises(UnsupportedModel, match="checked on the first whole prompt"):
            model(**inputs, mm_encoder_outputs={"image": features})
        model(**inputs, pixel_values=pixels)
        features = model.get_image_features(pixel_values=pixels, return_dict=True)
        model(**inputs, mm_encoder_outputs={"image": features})


class _Counts(nn.Module):
    """A decoder layer of a kind that nothing here knows: it adds what belongs to a slot."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.table = nn.Parameter(torch.randn(512, width))
        self.attention_type = "full_attention"
        self.self_attn = inner.self_attn
        self.input_layernorm = inner.input_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        placed = hidden_states + self.table[: hidden_states.shape[1]]
        return self.inner(placed, **kwargs)


@torch.no_grad()
def test_one_that_counts_slots_is_refused_and_left_as_it_was() -> None:
    model, inputs = house(), prompt()
    layers = model.model.language_model.layers
    layers[1] = _Counts(layers[1], 32)
    plain = model(**inputs).logits
    run = tried(model)
    with pytest.raises(UnsupportedModel, match="is refused: drop = hide: differs by") as caught:
        model(**inputs)
    assert "what leaves it" in str(caught.value)
    assert "layer 1 was given the right states" in str(caught.value)
    assert not run.active
    assert torch.equal(model(**inputs).logits, plain)
    report = visprune.check(model, inputs)
    assert not report.safe
    assert "generic, tried" in str(report)


def test_a_model_without_a_decoder_that_is_found_is_refused_at_once() -> None:
    model = house()
    model.model.language_model.layers = nn.Sequential(*model.model.language_model.layers)
    before = state(model)
    with pytest.raises(UnsupportedModel, match="the generic one does not fit it") as caught:
        visprune.prune(model, "random", num_keep=3)
    message = str(caught.value)
    assert "HouseForConditionalGeneration (house_vl) has no adapter" in message
    assert "has no decoder of its own" in message
    assert ", ".join(model_names()) in message
    assert state(model) == before


def state(model: Any) -> tuple[Any, ...]:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return hooks, sorted(vars(model)), sorted(vars(model.model))


@torch.no_grad()
def test_a_copy_is_checked_by_itself() -> None:
    model = house()
    with tried(model) as run:
        other = copy.deepcopy(model)
        other(**prompt())
        assert len(visprune.runs(other)[0].trace.kept[0]) == 3
        assert not run.trace.tokens_per_layer
        model(**prompt())
        later = copy.deepcopy(model)
        later(**prompt())
        assert torch.equal(visprune.runs(later)[0].trace.kept[0], run.trace.kept[0])
    visprune.remove(other)
    assert not other._forward_pre_hooks
    assert "generate" not in vars(other)


@torch.no_grad()
def test_the_first_prompt_is_whole() -> None:
    model, inputs = house(), prompt()
    with tried(model):
        cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True)["past_key_values"]
        with pytest.raises(ConfigError, match="without a cache"):
            model(**{**inputs, "attention_mask": None}, past_key_values=cache)


@torch.no_grad()
def test_the_call_that_is_checked_says_nothing() -> None:
    model = house()
    with tried(model), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**prompt())
