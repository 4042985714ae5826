# SPDX-License-Identifier: Apache-2.0
"""The contract bites: a wrong position, a wrong mask or a lost feature is seen in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.contract.oracle import alive, error, forwards
from tests.families.claimed import CLAIMED, inputs
from tests.families.oracle import gone_logits
from visprune.machine.decoder.forward import Forward
from visprune.machine.find import find_adapter

every_family = pytest.mark.parametrize("family", CLAIMED)
ROWS = [[3, "a", 6], [5, "b", 4, "C", 3]]


@torch.no_grad()
def missed(model: Any, eager: Any, family: str, method: str = "random") -> float:
    """How far a pruned forward is from hidden keys, or absent tokens."""
    prompt = inputs(family, ROWS)
    params = {"num_keep": 3, "positions": "original"}
    with forwards() as seen, visprune.prune(model, method, **params):
        logits = model(**prompt).logits
    keep = alive(seen[0])
    want = gone_logits(family, eager, prompt, keep)
    there = keep[-1] & prompt["attention_mask"].bool()
    return error(logits[there], want[there])


# No layer of Nemotron-H is told positions.
@pytest.mark.parametrize("family", [name for name in CLAIMED if name != "nemotron_h_omni"])
def test_closed_up_positions_are_caught(
    family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(self: Forward, table: Any, layer: int) -> torch.Tensor:
        return self.full_positions()[..., : table.num_slots]

    monkeypatch.setattr(Forward, "table_positions", closed)
    assert missed(models(family), models(family, "eager"), family) > 1e-3


@every_family
def test_masks_without_padding_are_caught(
    family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forward, "model_mask", lambda self: None)
    monkeypatch.setattr(Forward, "layer_mask", lambda self, layer, hidden: None)
    assert missed(models(family), models(family, "eager"), family) > 1e-3


LATER = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_omni_moe_thinker",
    "cosmos3_omni",
    "granite_docling",
    "cohere_compass",
)


def test_all_families_that_add_features_later_are_named(models: Any) -> None:
    adding = {name for name in CLAIMED if find_adapter(models(name)).adds_later}
    assert adding == {*LATER, "granite4_vision"}


@pytest.mark.parametrize("family", [*LATER, "granite4_vision"])
@pytest.mark.parametrize("method", ["random", "fastv"])
def test_features_of_other_tokens_are_caught(
    method: str, family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Forward.with_later

    def rolled(self: Forward, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        added = plain(self, layer, hidden) - hidden
        return hidden + added.roll(1, dims=1)

    monkeypatch.setattr(Forward, "with_later", rolled)
    assert missed(models(family), models(family, "eager"), family, method) > 1e-3


@pytest.mark.parametrize("family", [*LATER, "granite4_vision"])
@pytest.mark.parametrize("method", ["random", "fastv"])
def test_forgotten_features_are_caught(
    method: str, family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forward, "with_later", lambda self, layer, hidden: hidden)
    assert missed(models(family), models(family, "eager"), family, method) > 1e-3


@pytest.mark.parametrize("family", ["paligemma", "molmo2"])
def test_a_causal_mask_is_caught_where_pictures_are_seen_both_ways(
    family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Forward._by_place

    def causal(self: Forward, layer: int, dtype: torch.dtype) -> Any:
        self.masks = dict.fromkeys(self.masks or {})
        return plain(self, layer, dtype)

    monkeypatch.setattr(Forward, "_by_place", causal)
    monkeypatch.setattr(Forward, "_plain", lambda self, layer: False)
    assert missed(models(family), models(family, "eager"), family) > 1e-3


def test_a_wrong_rotary_embedding_is_caught(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Layers of Molmo 2 may have two.
    model = models("molmo2_scaled")
    kind = type(find_adapter(model))
    monkeypatch.setattr(kind, "rope_of", lambda self, layer: "scaled")
    assert missed(model, models("molmo2_scaled", "eager"), "molmo2_scaled", "fastv") > 1e-3


def test_experts_of_other_tokens_are_caught(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # ERNIE 4.5 VL tells its experts which tokens are visual.
    plain = Forward.by_token

    def rolled(self: Forward, given: Any, index: Any) -> dict[str, Any]:
        return {name: value.roll(2, dims=1) for name, value in plain(self, given, index).items()}

    monkeypatch.setattr(Forward, "by_token", rolled)
    family = "ernie4_5_vl_moe"
    assert missed(models(family), models(family, "eager"), family) > 1e-3
