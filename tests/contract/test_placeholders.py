# SPDX-License-Identifier: Apache-2.0
"""A placeholder that was typed, or cut off: one sentence, on every family, however it is called."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import visprune
from tests import tiny
from tests.contract.cases import batch, every_family
from tests.contract.test_removal import state

Inputs = dict[str, Any]


def typed(family: str, inputs: Inputs) -> Inputs:
    """A placeholder among the last words, as a user's text holds one that quotes it."""
    ids = inputs["input_ids"].clone()
    ids[0, -2] = tiny.IMAGE
    out = {**inputs, "input_ids": ids}
    if "mm_token_type_ids" in inputs:
        out["mm_token_type_ids"] = (ids == tiny.IMAGE).int()
    return out


def cut(family: str, inputs: Inputs) -> Inputs:
    """The end cut off in the midst of the picture, as by ``max_length``."""
    last = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[-1])
    same = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {k: v[:, : last - 1] if k in same else v for k, v in inputs.items()}


def doubled(family: str, inputs: Inputs) -> Inputs:
    """The picture stands there twice and was passed once."""
    (place,) = (inputs["input_ids"][0] == tiny.IMAGE).nonzero(as_tuple=True)
    same = ("input_ids", "attention_mask", "mm_token_type_ids")
    end = int(place[-1]) + 1
    twice = [*range(end), 0, *range(int(place[0]), end), *range(end, inputs["input_ids"].shape[1])]
    return {k: v[:, twice] if k in same else v for k, v in inputs.items()}


WRONG = {
    "typed": (typed, "was typed into its text"),
    "cut": (cut, "it was cut off, as max_length"),
    "doubled": (doubled, "stands there for images that were not passed"),
}


@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
@pytest.mark.parametrize("kind", WRONG)
@every_family
@torch.no_grad()
def test_one_sentence(family: str, kind: str, call: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    before = state(model)
    change, cause = WRONG[kind]
    wrong = change(family, inputs)
    tokens = int((inputs["input_ids"] == tiny.IMAGE).sum())
    found = int((wrong["input_ids"] == tiny.IMAGE).sum())
    message = rf"holds {found} image placeholder tokens \(id 90\), its 1 image makes? {tokens}: "
    options = {"max_new_tokens": 2, "num_beams": 2 if call == "beams" else 1}
    act = model if call == "forward" else partial(model.generate, **options)
    with visprune.prune(model, "uniform", num_keep=4):
        with pytest.raises(visprune.ConfigError, match=f"{message}.*{cause}"):
            act(**wrong)
        act(**inputs)  # the run goes on
    assert state(model) == before


@pytest.mark.parametrize("call", ["forward", "generate"])
@torch.no_grad()
def test_a_clip_and_a_placeholder_without_any_picture(call: str, models: Any) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl"):
        model = models(family)
        inputs = batch(family, [[3, "v", 6, "a"]])
        inputs["input_ids"][0, 4] = 7  # one of the clip's is missing
        inputs["mm_token_type_ids"][0, 4] = 0
        alone = batch(family, [[3, "a", 6]])
        alone["input_ids"][0, -2], alone["mm_token_type_ids"][0, -2] = tiny.VIDEO, 2
        with visprune.prune(model, "uniform", num_keep=4):
            act = model if call == "forward" else model.generate
            with pytest.raises(visprune.ConfigError, match=r"7 video placeholder.*1 video make"):
                act(**inputs)
            with pytest.raises(visprune.ConfigError, match=r"1 video placeholder.*0 videos make 0"):
                act(**alone)
