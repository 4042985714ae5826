# SPDX-License-Identifier: Apache-2.0
"""What is known of a decoder's layers is what they do: their attention's input, and its price."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import tiny
from visprune.machine.find import find_adapter

every_family = pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
LAYER = 1  # attends in every family


@every_family
@torch.no_grad()
def test_what_the_attention_of_a_layer_is_given(family: str, models: Any) -> None:
    model = models(family)
    adapter, seen = find_adapter(model), {}

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        seen["layer"] = adapter.as_rows(args[0] if args else kwargs["hidden_states"]).clone()

    def attends(module: Any, args: Any, kwargs: Any) -> None:
        seen["attention"] = args[0] if args else kwargs["hidden_states"]

    layer = adapter.layers[LAYER]
    handles = [
        layer.register_forward_pre_hook(enters, with_kwargs=True),
        adapter.attention(LAYER).register_forward_pre_hook(attends, with_kwargs=True),
    ]
    try:
        model(**tiny.inputs(family, [[3, "a", 6]]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(adapter.layer_input(layer, seen["layer"]), seen["attention"])


@every_family
def test_the_price_of_queries_and_keys(family: str, models: Any) -> None:
    adapter = find_adapter(models(family))
    attention = adapter.attention(LAYER)
    parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    weights: list[Tensor] = [part.weight for part in parts if part is not None]
    if len(weights) == len(parts):
        assert adapter.qk_macs(LAYER) == sum(weight.numel() for weight in weights)


@every_family
@torch.no_grad()
def test_the_norm_behind_the_last_layer(family: str, models: Any) -> None:
    adapter = find_adapter(models(family))
    assert adapter.final_norm is not None
    assert adapter.final_norm in set(adapter.language_model.children())
