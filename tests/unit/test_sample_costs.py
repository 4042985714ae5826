# SPDX-License-Identifier: Apache-2.0
"""The price of each sample of a batch, with a method and without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import visprune
from tests import tiny
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.find import find_adapter
from visprune.machine.price import prompt_costs, sample_costs

ROWS: list[list[Any]] = [[3, "a", 5], [2, "b", 12]]


def priced(model: Any, inputs: dict[str, Any], method: str, **params: Any) -> tuple[Any, Any]:
    """(costs per sample as if alone, cost of the padded batch)."""
    with visprune.prune(model, method, **params) as run, torch.no_grad():
        model(**inputs)
        return sample_costs(run, new_tokens=[3, 1]), run.cost(new_tokens=3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_untouched_model_costs_what_keep_all_costs(family: str) -> None:
    model = tiny.build(family)
    inputs = tiny.inputs(family, ROWS)
    kept, _ = priced(model, inputs, "keep_all")
    adapter = find_adapter(model)
    layouts = adapter.layouts(inputs, {"image": adapter.pictures(inputs, "image")})
    assert prompt_costs(adapter, inputs, layouts, new_tokens=[3, 1]) == kept
    assert kept[0].decode > 0 == kept[1].decode


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_a_sample_in_a_padded_batch_costs_what_it_costs_alone(family: str, method: str) -> None:
    model = tiny.build(family)
    together, padded = priced(model, tiny.inputs(family, ROWS), method, num_keep=4)
    for number, row in enumerate(ROWS):
        with visprune.prune(model, method, num_keep=4) as run, torch.no_grad():
            model(**tiny.inputs(family, [row]))
            (alone,) = sample_costs(run, new_tokens=[(3, 1)[number]])
        assert together[number].parts == alone.parts
        assert together[number].kv_bytes == alone.kv_bytes
    assert sum(cost.kv_bytes for cost in together) < padded.kv_bytes  # padding is stored
    assert sum(cost.prefill for cost in together) == padded.prefill  # but belongs to nobody
    assert sum(cost.selection for cost in together) == padded.selection


def test_a_text_prompt_needs_no_layouts() -> None:
    model = tiny.build("llava")
    (cost,) = prompt_costs(
        find_adapter(model), {"input_ids": torch.ones(1, 7, dtype=torch.long)}, [], new_tokens=[1]
    )
    assert cost.vision == cost.projector == cost.selection == cost.decode == 0
    assert cost.prefill > 0


def test_counts_for_another_number_of_samples_are_refused() -> None:
    model = tiny.build("llava")
    inputs = tiny.inputs("llava", ROWS)
    with visprune.prune(model, "uniform", num_keep=4) as run, torch.no_grad():
        model(**inputs)
        with pytest.raises(ConfigError, match="one count for each of the 2 samples, got 1"):
            sample_costs(run, new_tokens=[1])
    with pytest.raises(ConfigError, match="one count for each of the 2 samples, got 3"):
        prompt_costs(find_adapter(model), inputs, [], new_tokens=[1, 1, 1])


def siglip() -> Any:
    """LLaVA over SigLIP, whose pooling head runs though nobody reads it."""
    torch.manual_seed(0)
    plain = tiny.build("llava")
    sizes = {k: getattr(plain.config.vision_config, k) for k in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "image_size", "patch_size"
    )}  # fmt: skip
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**sizes),
        text_config=plain.config.text_config,
        image_token_id=tiny.IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",  # SigLIP has no class token to leave out
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


def with_class_token() -> tuple[Any, dict[str, Any]]:
    """LLaVA whose class token is projected too: one placeholder more."""
    model, inputs = tiny.build("llava", attn="eager"), tiny.inputs("llava", [[3, "a", 5]])
    model.config.vision_feature_select_strategy = "full"
    ids = inputs["input_ids"]
    more = torch.full((1, 1), tiny.IMAGE)
    inputs["input_ids"] = torch.cat([ids[:, :3], more, ids[:, 3:]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model, inputs


REDUCED = {
    "llava": lambda: (tiny.build("llava", attn="eager"), tiny.inputs("llava", [[3, "a", 5]])),
    "class token": with_class_token,
    "siglip": lambda: (siglip(), tiny.inputs("llava", [[3, "a", 5]])),
    "llava_next": lambda: (
        tiny.build("llava_next", attn="eager"),
        tiny.inputs("llava_next", [[2, "A", 4]]),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", REDUCED)
@pytest.mark.parametrize(("method", "params"), [("keep_all", {}), ("tome", {"r": 3}), ("evit", {})])
def test_a_reduced_encoder_costs_what_the_counter_sees(
    kind: str, method: str, params: dict[str, Any]
) -> None:
    model, inputs = REDUCED[kind]()
    if (kind, method) == ("siglip", "evit"):
        with pytest.raises(UnsupportedModel, match="class token"):
            visprune.prune(model, method, **params)
        return
    with visprune.prune(model, method, **params) as run:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        cost = run.cost()
    seen = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    (tower,) = (macs for name, macs in seen.items() if name.endswith(".vision_tower"))
    (projector,) = (macs for name, macs in seen.items() if name.endswith(".multi_modal_projector"))
    assert cost.vision + cost.selection == tower  # these methods choose by matrix products alone
    assert cost.projector == projector
