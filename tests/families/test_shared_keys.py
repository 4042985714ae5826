# SPDX-License-Identifier: Apache-2.0
"""Layers that attend to keys of another layer, and inputs of each layer (Gemma 4 and 3n, small)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.contract.oracle import error
from tests.families import tiny
from visprune.errors import ConfigError
from visprune.machine.decoder.forward import Forward
from visprune.machine.find import find_adapter

FAMILIES = ("gemma4_small", "gemma3n")
small_families = pytest.mark.parametrize("family", FAMILIES)
GENERATE: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": list(range(86, 100)),
}


@small_families
def test_whose_keys_a_layer_attends_to(family: str, models: Any) -> None:
    adapter = find_adapter(models(family))
    assert [adapter.keeper(n) for n in range(6)] == [0, 1, 2, 3, 2, 3]
    assert adapter.deepest == 2


@small_families
def test_tokens_leave_no_later_than_the_keys_that_are_shared(family: str, models: Any) -> None:
    with pytest.raises(ConfigError, match=r"leave at layers up to 2"):
        visprune.prune(models(family), "fastv", num_keep=3, layer=3)
    visprune.prune(models(family), "fastv", num_keep=3, layer=2).remove()


@small_families
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["random", "fastv"])
@torch.no_grad()
def test_the_last_row_alone_says_what_all_rows_say(
    name: str, positions: Any, family: str, models: Any
) -> None:
    # `generate` asks for one row, and Gemma 4 goes on with that one behind the shared keys.
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6], [2, "b", 4, "C", 3], [5]])
    seen: list[int] = []
    last = find_adapter(model).layers[-1]
    with visprune.prune(model, name, num_keep=3, positions=positions):
        want = model(**inputs).logits
        handle = last.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-2]))
        made = model.generate(**inputs, **GENERATE)
        handle.remove()
    assert (seen[0] == 1) == (family == "gemma4_small")
    assert error(made.logits[0], want[:, -1]) < 2e-5


@torch.no_grad()
def test_a_right_padded_batch_asks_for_all_rows(models: Any) -> None:
    model = models("gemma4_small")
    inputs = tiny.inputs("gemma4_small", [[3, "a", 6], [2, "b"]], pad_side="right")
    with visprune.prune(model, "random", num_keep=3):
        whole = model(**inputs).logits
        assert error(model(**inputs, logits_to_keep=1).logits[:, -1], whole[:, -1]) < 1e-5


@small_families
@torch.no_grad()
def test_inputs_of_other_tokens_are_caught(
    family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Teeth: an input of a layer that stays behind when tokens leave changes the answer.
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
    plain = Forward.by_token

    def rolled(self: Forward, given: Any, index: Any) -> dict[str, Any]:
        found = plain(self, given, index)
        return {name: value.roll(2, dims=1) for name, value in found.items()}

    with visprune.prune(model, "fastv", num_keep=3):
        want = model(**inputs).logits[0, -1]
        monkeypatch.setattr(Forward, "by_token", rolled)
        got = model(**inputs).logits[0, -1]
    assert error(got, want) > 1e-3


@torch.no_grad()
def test_hidden_states_of_streams_have_the_length_of_the_input(models: Any) -> None:
    model, inputs = models("gemma3n"), tiny.inputs("gemma3n", [[3, "a", 6], [2, "b", 4]])
    plain = model(**inputs, output_hidden_states=True).hidden_states
    with visprune.prune(model, "fastv", num_keep=3):
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert [x.shape for x in states] == [x.shape for x in plain]
