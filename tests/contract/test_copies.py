# SPDX-License-Identifier: Apache-2.0
"""Copies of pruned models and of their caches."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import visprune
from tests import tiny
from tests.contract.cases import batch
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.errors import UnsupportedModel


def continued(model: Any, cache: DynamicCache, inputs: dict[str, Any]) -> torch.Tensor:
    token = torch.tensor([[7]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return model(input_ids=token, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits


@pytest.mark.parametrize("how", ["copy", "pickle"])
@torch.no_grad()
def test_a_copied_cache_belongs_to_the_run_that_wrote_it(how: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    run = visprune.prune(model, "fastv", num_keep=5)
    cache = cache_of(model(**inputs, use_cache=True))
    copied = copy.deepcopy(cache) if how == "copy" else pickle.loads(pickle.dumps(cache))
    want = continued(model, copy.deepcopy(cache), inputs)
    assert torch.equal(continued(model, copied, inputs), want)
    again = copy.deepcopy(cache) if how == "copy" else pickle.loads(pickle.dumps(cache))
    run.remove()
    with pytest.raises(UnsupportedModel, match="written under visprune"):
        continued(model, again, inputs)


@torch.no_grad()
def test_a_pickled_cache_of_a_run_that_is_gone(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    run = visprune.prune(model, "fastv", num_keep=5)
    data = pickle.dumps(cache_of(model(**inputs, use_cache=True)))
    run.remove()
    del run
    gc.collect()
    with pytest.raises(UnsupportedModel, match="which has been removed"):
        continued(model, pickle.loads(data), inputs)


@torch.no_grad()
def test_a_copy_of_a_pruned_model_can_be_freed() -> None:
    model, inputs = tiny.build("llava"), batch("llava", [[3, "a", 6]])
    dense = model(**inputs).logits
    run = visprune.prune(model, "fastv", num_keep=5)
    pruned = model(**inputs).logits
    other = copy.deepcopy(model)
    (theirs,) = visprune.runs(other)
    assert visprune.runs(model) == [run]
    assert theirs is not run
    assert theirs.adapter.model is other
    run.remove()
    assert torch.equal(model(**inputs).logits, dense)
    assert torch.equal(other(**inputs).logits, pruned)  # the copy is still pruned
    visprune.remove(other)
    assert visprune.runs(other) == []
    assert torch.equal(other(**inputs).logits, dense)
    gone = weakref.ref(other)
    del other, theirs
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_features_that_were_merged_by_hand(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    ids = inputs["input_ids"]

    def merged() -> torch.Tensor:
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"])
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == tiny.IMAGE] = torch.cat(list(features.pooler_output))
        merged.features = features  # type: ignore[attr-defined]
        return embeds

    with visprune.prune(model, "divprune", num_keep=5) as run:
        want, kept = model(**inputs).logits, run.trace.kept
        got = model(inputs_embeds=merged(), attention_mask=inputs["attention_mask"]).logits
        assert torch.equal(run.trace.kept[0], kept[0])
        assert torch.allclose(got, want, atol=1e-5)
        changed = merged() * 2
        with pytest.warns(UserWarning, match="encoded by hand.*nothing is pruned"):
            model(inputs_embeds=changed, attention_mask=inputs["attention_mask"])
