# SPDX-License-Identifier: Apache-2.0
"""Merging inside the decoder equals its layers run one by one, with the explicit maps between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract import oracle
from tests.contract.cases import batch, few, places
from tests.contract.test_merge import decoder_inputs
from visprune.core.selection import Selection

Stages = list[tuple[int, Selection]]
METHODS = {
    "sparsevlm": {},
    "sparsevlm adaptive": {"adaptive": 0.5, "lists": (9, 9, 9)},
    "lightkv": {},
    "pact": {"cutoff": 0.6},
    "vitcop": {"peaks": 0.3},
    "vitcop official": {"peaks": 0.3, "official": True},
    "vscan": {},
}


def replayed(
    model: Any, inputs: dict[str, Any], free: Tensor, stages: Stages, compact: bool
) -> Any:
    """Logits of one prompt with one picture, and the places that are left of it."""
    decoder = model.model.language_model
    x, ids = decoder_inputs(model, inputs)
    stands, visual = torch.arange(x.shape[1]), free
    for number, layer in enumerate(decoder.layers):
        for selection in (s for at, s in stages if at == number):
            merged = selection.matrix()[0] @ x[0, visual]
            staying = [n for n in range(x.shape[1]) if n not in set(visual.tolist())]
            slots = [(int(stands[n]), 0, int(stands[n]), x[0, n]) for n in staying]
            last = -1
            for rank, (index, row) in enumerate(zip(selection.index[0], merged, strict=True)):
                own = int(stands[visual[index]])
                last = max(last, own)  # slots stay in the selection's order
                slots.append((last, rank, own, row))
            slots.sort(key=lambda slot: slot[:2])
            x = torch.stack([slot[3] for slot in slots])[None]
            stands = torch.tensor([slot[2] for slot in slots])
            owners = set(free.tolist())
            visual = torch.tensor([n for n, at in enumerate(stands.tolist()) if at in owners])
        places_now = torch.arange(len(stands))[None] if compact else ids[..., stands]
        rotary = decoder.rotary_emb(x, position_ids=places_now)
        x = layer(x, attention_mask=None, position_ids=None, position_embeddings=rotary)
    return model.lm_head(decoder.norm(x))[0], stands


PAIRS = [
    (name, family)
    for name in METHODS
    for family in ("llava", "qwen2_5_vl")
    if family == "llava" or name.split()[0] not in ("vitcop", "vscan")  # no class token
]


@pytest.mark.parametrize(("name", "family"), PAIRS)
@torch.no_grad()
def test_merging_inside_equals_the_layers_one_by_one(name: str, family: str, models: Any) -> None:
    method = name.split()[0]
    model, inputs = models(family), batch(family, [[4, "a", 7]])
    ((_, free, _),) = places(family, inputs)
    stages: Stages = []

    def note(site: Any, tokens: Any, ctx: Any, selection: Selection, seconds: float) -> None:
        layer = 0 if site.kind == "projector" else site.resolve(4)
        stages.append((layer, selection))

    with visprune.prune(model, method, **{**few(method), **METHODS[name]}) as run:
        run.observe(note)
        logits, trace = model(**inputs).logits[0], run.trace
        compact = run.plan.positions == "compact"
    assert any(selection.merges for _, selection in stages)
    want, stands = replayed(model, inputs, free, stages, compact)
    found = trace.index[0]
    assert found is not None
    assert sorted(stands.tolist()) == (found >= 0).nonzero()[:, 0].tolist()
    oracle.assert_close(logits[stands], want)
