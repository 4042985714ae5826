# SPDX-License-Identifier: Apache-2.0
"""A prompt that is read once: its cache goes into a file, and many questions are asked of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract import oracle
from tests.contract.cache_oracle import few
from tests.contract.cases import batch
from tests.contract.test_generate import GREEDY, best
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.errors import UnsupportedModel

# What these keep of a picture does not depend on what is asked.
AGNOSTIC = ("knorm", "streaming_llm")


def asked(question: list[int]) -> dict[str, Any]:
    return batch("llava", [[3, "a", *question]])


def visual(model: Any, name: str, question: list[int]) -> list[list[list[int]]]:
    """The visual tokens that each head of each layer keeps, with the question in the prompt."""
    with visprune.prune(model, name, **few(name)) as run:
        inputs = asked(question)
        model(**inputs, use_cache=True)
        kept = run.trace.cache.kept[0]
    places = set((inputs["input_ids"][0] == 90).nonzero()[:, 0].tolist())
    return [[sorted(places & set(head.tolist())) for head in layer] for layer in kept]


@torch.no_grad()
def test_which_methods_do_not_look_at_the_question(models: Any) -> None:
    model = models("llava")
    for name in AGNOSTIC:
        assert visual(model, name, [5, 6, 7]) == visual(model, name, [40, 41, 8])
    assert visual(model, "snapkv", [5, 6, 7]) != visual(model, "snapkv", [40, 41, 8])


@pytest.mark.parametrize("name", [*AGNOSTIC, "adakv", "zipcache", "think", "actqkv"])
@torch.no_grad()
def test_prefill_once_ask_many(name: str, models: Any, tmp_path: Path) -> None:
    model, file = models("llava"), tmp_path / "picture.pt"
    picture = batch("llava", [[3, "a"]])
    prefix = picture["input_ids"]
    with visprune.prune(model, name, **few(name)) as run:
        cache = cache_of(model(**picture, use_cache=True))
        stored = run.trace.cache.slots
        torch.save(cache, file)
        loaded = torch.load(file, weights_only=False)
        answers = []
        for question in ([5, 6, 7], [40, 41, 8]):
            ids = torch.cat([prefix, torch.tensor([question])], dim=1)
            whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            # The same question to a picture that is read anew.
            fresh = cache_of(model(**picture, use_cache=True))
            after = oracle.step(model, picture, torch.tensor([question]))
            want = model(**after, **{CACHE_ARGUMENT: fresh}).logits
            for mine in (copy.deepcopy(cache), copy.deepcopy(loaded)):
                assert torch.equal(model(**after, **{CACHE_ARGUMENT: mine}).logits, want)
            mine = copy.deepcopy(loaded)
            out = model.generate(**whole, **{CACHE_ARGUMENT: mine}, **GREEDY)
            assert torch.equal(out[0, ids.shape[1]], best(want)[0, -1])
            assert mine.get_seq_length() == out.shape[1] - 1
            answers.append(want)
        assert not torch.equal(*answers)
        # What was asked has left no trace in the cache that was copied.
        again = torch.load(file, weights_only=False)
        assert again.get_seq_length() == loaded.get_seq_length() == prefix.shape[1]
        assert all(max(heads) < prefix.shape[1] for heads in stored[0]) or name in (
            "zipcache",
            "actqkv",
        )
    with pytest.raises(UnsupportedModel, match="removed"):
        model(**after, **{CACHE_ARGUMENT: loaded})


@torch.no_grad()
def test_two_at_the_projector_and_one_at_the_cache(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    length, marks = inputs["input_ids"].shape[1], inputs["input_ids"][0] == 90
    chain = [
        visprune.get_method("uniform", num_keep=20),
        visprune.get_method("divprune", num_keep=12),
        visprune.get_method("adakv", num_keep=5),
    ]
    with visprune.prune(model, chain) as run:
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        trace = run.trace
    with visprune.prune(model, chain[:2]) as run:
        plain = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        two = run.trace
    text = int((~marks).sum())
    assert torch.equal(trace.kept[0], two.kept[0])
    assert len(trace.kept[0]) == 12
    assert trace.cache.before == [[text + 12] * 4]
    assert all(abs(sum(x) / 2 - text - 5) <= 1 for x in trace.cache.slots[0])
    assert "ragged" in trace.cache.form  # a layer whose heads happen to keep as many is even
    assert torch.equal(out.logits[0], plain.logits[0])
    assert not torch.equal(out.logits[1], plain.logits[1])
    left: Tensor = marks.nonzero()[:, 0][trace.kept[0]]
    for kept in (head for layer in trace.cache.kept[0] for head in layer):
        assert set(kept.tolist()) <= {*left.tolist(), *(~marks).nonzero()[:, 0].tolist()}
        assert int(kept.max()) == length - 1
