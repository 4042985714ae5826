# SPDX-License-Identifier: Apache-2.0
"""Decoders with recurrent layers: what dropping means there, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.contract.oracle import alive, error, forwards, step
from tests.families import tiny
from tests.families.oracle import absent_logits, decoder_call, hidden_logits, last_states
from visprune.backbones.hf.cache import CACHE_ARGUMENT, SlotLayer, cache_of
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.find import find_adapter

FAMILIES = tuple(name for name, spec in tiny.FAMILIES.items() if spec.recurrent)
recurrent_families = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def test_absent_is_hidden_where_every_layer_attends(models: Any) -> None:
    # The oracle of recurrent layers says of others what the oracle of hidden keys says.
    model, inputs = models("internvl", "eager"), tiny.inputs("internvl", [[3, "a", 6], [2, "b"]])
    with forwards() as seen, visprune.prune(models("internvl"), "fastv", num_keep=3):
        models("internvl")(**inputs)
    keep = alive(seen[0])
    there = keep[-1] & inputs["attention_mask"].bool()
    absent, hidden = absent_logits(model, inputs, keep), hidden_logits(model, inputs, keep)
    assert error(absent[there], hidden[there]) < 1e-5


@recurrent_families
@torch.no_grad()
def test_a_mask_with_holes_is_not_absence(family: str, models: Any) -> None:
    # Teeth: padding in the middle zeroes a token and still lets the state decay.
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
    with forwards() as seen, visprune.prune(model, "random", num_keep=3, positions="original"):
        pruned = last_states(model, inputs)[0, -1]
    holes = alive(seen[0])[-1].long()
    given = {**decoder_call(model, inputs), "attention_mask": holes, "use_cache": False}
    padded = find_adapter(model).language_model(**given).last_hidden_state[0, -1]
    assert error(pruned, padded) > 1e-3


@recurrent_families
@torch.no_grad()
def test_only_attention_keeps_slots(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "A", 6]])
    with visprune.prune(model, "random", num_keep=3) as run:
        cache = cache_of(model(**inputs, use_cache=True))
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    recurrent = find_adapter(model).recurrent
    assert 0 in recurrent
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, SlotLayer) == (number not in recurrent)
        assert (run.trace.stored_per_layer[0][number] == 0) == (number in recurrent)


@recurrent_families
def test_attention_is_asked_of_layers_that_have_it(family: str, models: Any) -> None:
    with pytest.raises(ConfigError, match=r"decoder layer 0, which has no attention.* 2, 3\."):
        visprune.prune(models(family), "fastv", num_keep=3, layer=1)


@torch.no_grad()
def test_uneven_rows_of_a_later_turn_are_refused(models: Any) -> None:
    model = models("lfm2_vl")
    first = tiny.inputs("lfm2_vl", [[3, "a", 6], [3, "a", 6]])
    second = tiny.inputs("lfm2_vl", [[2, "b", 4], [24]], pad_side="left")
    ones = torch.ones(2, first["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([ones, second["attention_mask"]], 1)
    with visprune.prune(model, "random", num_keep=3):
        cache = cache_of(model(**first, use_cache=True))
        with pytest.raises(UnsupportedModel, match="Give the rows one by one"):
            model(**{**second, "attention_mask": mask, CACHE_ARGUMENT: cache})


@torch.no_grad()
def test_a_state_behind_padding_is_not_continued(models: Any) -> None:
    model = models("lfm2_vl")
    inputs = tiny.inputs("lfm2_vl", [[3, "a", 6], [2, "b"]], pad_side="right")
    with visprune.prune(model, "random", num_keep=3):
        cache = cache_of(model(**inputs, use_cache=True))
        more = step(model, inputs, torch.tensor([[7], [8]]))
        with pytest.raises(UnsupportedModel, match="Pad prompts on the left"):
            model(**more, **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("name", ["random", "fastv"])
@torch.no_grad()
def test_a_four_dimensional_mask_is_cut(name: str, models: Any) -> None:
    # It says nothing to recurrent layers, which still must not take in what evens out rows.
    model, inputs = models("lfm2_vl"), tiny.inputs("lfm2_vl", [[3, "a", 6], [24]])
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with visprune.prune(model, name, num_keep=3, positions="original") as run:
        want = model(**inputs).logits
        there = run.trace.index >= 0
        got = model(**{**inputs, "attention_mask": causal}).logits
    assert error(got[there], want[there]) < 1e-5


def test_slices_are_put_together_of_their_patches(models: Any) -> None:
    adapter = find_adapter(models("minicpmv4_6"))
    picture = torch.arange(3 * 8 * 12).view(3, 8, 12).float()
    line = torch.nn.functional.unfold(picture[None], 4, stride=4)  # [1, 3*4*4, 6]
    line = line.view(1, 3, 4, 4, 6).transpose(-1, -2).flatten(-2)
    call = {
        "pixel_values": torch.cat([line, -line], -1),
        "target_sizes": torch.tensor([[2, 3], [2, 3]]),
    }
    own = adapter.pixels_of(call, "image", [1, 1])
    assert torch.equal(own[0], picture)
    assert torch.equal(own[1], -picture)


@pytest.mark.parametrize("family", ["lfm2_vl"])
@pytest.mark.parametrize("name", ["random", "fastv"])
@torch.no_grad()
def test_compact_positions_are_those_of_the_shorter_sequence(
    name: str, family: str, models: Any
) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
    with forwards() as seen, visprune.prune(model, name, num_keep=3, positions="compact"):
        pruned = last_states(model, inputs)[0, -1]
    keep = [one[0] for one in alive(seen[0])]
    call = decoder_call(model, inputs)
    if name == "random":  # all leave before the first layer
        given = {"inputs_embeds": call["inputs_embeds"][:, keep[0]], "use_cache": False}
        alone = find_adapter(model).language_model(**given).last_hidden_state[0, -1]
        assert error(pruned, alone) < 1e-5
    with visprune.prune(model, name, num_keep=3, positions="original"):
        assert error(last_states(model, inputs)[0, -1], pruned) > 1e-4
