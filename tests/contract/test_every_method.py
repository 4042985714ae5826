# SPDX-License-Identifier: Apache-2.0
"""What holds of every method in the registry, on each family: short, so that a method costs little.

A pair is refused with the reason, or: keeping all changes no bit; the decoder computes what the
selection's explicit map says, or where stages lie inside it, what the model says with the dropped
tokens hidden; a batch is its samples; answers are generated; and the model is left as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
import visprune.catalog
from tests.contract import oracle
from tests.contract.cases import (
    EVERY,
    FAMILIES,
    FIRST,
    NO_BUDGET,
    WHOLE_PICTURES,
    batch,
    everything,
    few,
)
from tests.contract.test_batch import placed
from tests.contract.test_merge import decoder_inputs, mapped_row
from tests.contract.test_removal import state
from visprune.machine.decoder.forward import Forward
from visprune.machine.find import find_adapter
from visprune.machine.plan import Plan, why_not

GREEDY = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [90, 91, 92, 93]}
CLIPS = ("qwen2_vl", "qwen2_5_vl")
LATER = [name for name in EVERY if name not in FIRST]


def rows_of(family: str) -> list[list[Any]]:
    """Left padding, two pictures in a row, a clip where the family has them, text alone."""
    return [[3, "a", 6], [2, "b", 4, "v" if family in CLIPS else "b", 3], [5]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LATER)
@torch.no_grad()
def test_what_holds_of_every_method(name: str, family: str, models: Any) -> None:
    model, rows = models(family), rows_of(family)
    before = state(model)
    reason = why_not(visprune.catalog.methods.get(name), find_adapter(model).spec)
    if reason is not None:
        with pytest.raises(
            visprune.UnsupportedModel, match=r"Methods that fit it: .*todre"
        ) as found:
            visprune.prune(model, name, **few(name))
        assert name in str(found.value)
        assert state(model) == before
        return
    inputs = placed(name, family, batch(family, rows))
    plain, valid = model(**inputs).logits, inputs["attention_mask"].bool()
    if NO_BUDGET.get(name, ({}, {}))[0] is not None:
        with visprune.prune(model, name, **everything(name)):
            assert torch.equal(model(**inputs).logits, plain)
    with oracle.forwards() as seen, visprune.prune(model, name, **few(name)) as run:
        logits, kept = model(**inputs).logits, run.trace.kept
        assert torch.isfinite(logits[valid]).all()
        generated = model.generate(**inputs, **GREEDY)
        alone = []
        for number, row in enumerate(rows):
            single = model(**batch(family, [row])).logits[0]
            assert oracle.error(logits[number, valid[number]], single) <= 2e-5
            if number < 2:
                alone += run.trace.kept
        plan = run.plan
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 2
    assert sorted(k.tolist() for k in kept) == sorted(k.tolist() for k in alone)
    left = any(bool((valid & ~there).any()) for there in oracle.alive(seen[0]))
    assert left == (name not in WHOLE_PICTURES or family in CLIPS)
    agree_with_the_untouched_model(model, inputs, seen[0], logits, plan)
    assert state(model) == before
    assert torch.equal(model(**inputs).logits, plain)


def agree_with_the_untouched_model(
    model: Any, inputs: dict[str, Any], forward: Forward, logits: Tensor, plan: Plan
) -> None:
    """Compare a pruned forward with the untouched decoder, by the selections that were made."""
    valid, images = inputs["attention_mask"].bool(), forward.images
    compact = plan.positions == "compact"
    if all(not s.merges for image in images for s in image.chosen):
        keep = oracle.alive(forward)
        want = oracle.hidden_logits(model, inputs, keep, compact=compact)
        there = keep[-1] & valid
        oracle.assert_close(logits[there], want[there])
        return
    if plan.decoder_stages or any(len(image.chosen) != 1 for image in images):
        return  # merges inside the decoder have tests of their own
    embeds, ids = decoder_inputs(model, inputs)
    for row in range(len(embeds)):
        own = [
            (image.layout.positions[image.layout.picture.free], image.chosen[0])
            for image in images
            if image.layout.row == row
        ]
        short, stands = mapped_row(embeds[row], valid[row], own)
        places = (
            torch.arange(len(stands))[None] if compact else ids[..., row : row + 1, :][..., stands]
        )
        hidden = model.model.language_model(
            inputs_embeds=short[None], position_ids=places,
            attention_mask=torch.ones(1, len(stands)), use_cache=False,
        ).last_hidden_state  # fmt: skip
        oracle.assert_close(logits[row, stands], model.lm_head(hidden)[0])
