# SPDX-License-Identifier: Apache-2.0
"""Taking a method off leaves the model bit for bit what it was, whatever happened in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import visprune
from tests import tiny
from tests.contract.cases import ALL_PAIRS, PAIRS, UNSUPPORTED, batch, every_family, every_pair, few
from visprune.catalog import model_names

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
         "_backward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")  # fmt: skip


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that an instance and its class hold, by identity, for every module."""
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        # Qwen notes the offset of its last prompt on itself, pruned or not.
        out[name] = {k: id(v) for k, v in vars(module).items() if k != "rope_deltas"}
        out[name, "hooks"] = {hook: tuple(map(id, vars(module)[hook].values())) for hook in HOOKS}
        out[name, "config"] = dict(vars(module.config)) if hasattr(module, "config") else None
        for kind in type(module).__mro__[:-1]:
            out[kind] = {key: id(value) for key, value in vars(kind).items()}
    return out


class Boom(RuntimeError):
    pass


@every_pair
def test_removal_restores(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with torch.no_grad():
        want = model(**inputs).logits
        before = state(model)
        run = visprune.prune(model, name, **few(name))
        assert state(model) != before
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        run.remove()
        assert state(model) == before
        assert torch.equal(model(**inputs).logits, want)
    run.remove()  # a second time is harmless
    assert state(model) == before
    assert "removed" in repr(run)


@every_pair
def test_an_exception_in_forward_restores(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with torch.no_grad():
        want = model(**inputs).logits
    before = state(model)

    def boom(*args: Any) -> None:
        raise Boom

    layers = model.model.language_model.layers
    places = (layers[2].mlp, layers[1].self_attn.q_proj, model.lm_head, _tower_layer(model))
    # All places under one method; under each other the places take turns.
    turn = places[PAIRS.index((name, family)) % len(places)]
    for place in places if name == "fastv" else (turn,):
        handle = place.register_forward_pre_hook(boom)
        try:
            with pytest.raises(Boom), visprune.prune(model, name, **few(name)):
                model(**inputs)
        finally:
            handle.remove()
        assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


def _tower_layer(model: nn.Module) -> nn.Module:
    core = model.model
    if hasattr(core, "visual"):
        return core.visual.blocks[-1]
    return core.vision_tower.encoder.layers[-1].mlp


@every_pair
def test_a_run_survives_an_exception_in_forward(name: str, family: str, models: Any) -> None:
    # The forward after the one that failed is not the worse for it.
    model, inputs = models(family), batch(family)

    def boom(*args: Any) -> None:
        raise Boom

    with torch.no_grad(), visprune.prune(model, name, **few(name)):
        want = model(**inputs).logits
        for layer in (0, 2):
            handle = model.model.language_model.layers[layer].mlp.register_forward_pre_hook(boom)
            with pytest.raises(Boom):
                model(**inputs)
            handle.remove()
        assert torch.equal(model(**inputs).logits.nan_to_num(), want.nan_to_num())


@every_family
def test_an_exception_in_the_block_restores(family: str, models: Any) -> None:
    model = models(family)
    before = state(model)
    with pytest.raises(Boom), visprune.prune(model, "todre", num_keep=4):
        raise Boom
    assert state(model) == before


@pytest.mark.parametrize(("name", "family"), sorted(UNSUPPORTED))
def test_an_unsupported_pair_is_refused(name: str, family: str, models: Any) -> None:
    model = models(family)
    before = state(model)
    with pytest.raises(visprune.UnsupportedModel) as caught:
        visprune.prune(model, name, **few(name))
    message = str(caught.value)
    assert name in message
    assert family in message
    assert "class token" in message
    assert "todre" in message  # what can be used instead
    assert state(model) == before


def test_the_families_of_the_suite_are_in_the_registry() -> None:
    # tests/families has the others.
    assert {family for _, family in ALL_PAIRS} == set(tiny.FAMILIES)
    assert set(tiny.FAMILIES) < set(model_names())
