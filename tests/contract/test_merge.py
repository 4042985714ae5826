# SPDX-License-Identifier: Apache-2.0
"""Merging equals applying the explicit map to what the untouched decoder is fed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract import oracle
from tests.contract.cases import FAMILIES, LINE_FAMILIES, MERGING, PAIRS, batch, few, places
from visprune.core.selection import Selection

MERGES = [pair for pair in PAIRS if pair[0] in MERGING]
CASES = [(name, family, "original") for name, family in MERGES] + [
    (name, family, "compact") for name, family in MERGES if family in LINE_FAMILIES
]


@contextmanager
def noted_selections(name: str) -> Iterator[list[Selection]]:
    """Every selection of the method, one per picture, in the order of the calls."""
    kind, found = type(visprune.get_method(name, **few(name))), []
    select = kind.select

    def noted(self: Any, tokens: Any, ctx: Any) -> Selection:
        made = select(self, tokens, ctx)
        for n in range(len(made.index)):
            found.append(made.row(n))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "select", noted)
        yield found


def decoder_inputs(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, S, D]`` and position ids ``[..., B, S]`` of the untouched decoder."""
    seen: dict[str, Any] = {}

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        handle.remove()
    embeds, ids = seen["inputs_embeds"], seen.get("position_ids")
    if ids is None:
        ids = torch.arange(embeds.shape[1]).expand(len(embeds), -1)
    return embeds, ids


def mapped_row(
    embeds: Tensor, valid: Tensor, pictures: list[tuple[Tensor, Selection]]
) -> tuple[Tensor, Tensor]:
    """One row after the maps: features ``[K, D]`` and the place that each slot stands for."""
    leaving = torch.cat([free for free, _ in pictures]).tolist() if pictures else []
    staying = sorted(set(valid.nonzero()[:, 0].tolist()) - set(leaving))
    slots = [(at, at, embeds[at]) for at in staying]
    for free, selection in pictures:
        merged = selection.matrix()[0] @ embeds[free]
        stands, last = free[selection.index[0]].tolist(), -1
        for at, feature in zip(stands, merged, strict=True):
            last = max(last, at)  # slots stay in the selection's order
            slots.append((last, at, feature))
    slots.sort(key=lambda slot: slot[0])
    return torch.stack([slot[2] for slot in slots]), torch.tensor([slot[1] for slot in slots])


@pytest.mark.parametrize(("name", "family", "positions"), CASES)
@torch.no_grad()
def test_merge_equals_the_explicit_map(name: str, family: str, positions: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    embeds, ids = decoder_inputs(model, inputs)
    params = few(name, num_keep=13, positions=positions)
    with noted_selections(name) as made, visprune.prune(model, name, **params) as run:
        logits = model(**inputs).logits
    found = places(family, inputs)
    counts = [len(free) for _, free, _ in found]
    # Pictures of one size are selected together, sizes in order of appearance.
    order = [n for size in dict.fromkeys(counts) for n, c in enumerate(counts) if c == size]
    maps = dict(zip(order, made, strict=True))
    assert all(maps[n].merges for n in maps)
    valid = inputs["attention_mask"].bool()
    for row in range(len(embeds)):
        own = [(free, maps[n]) for n, (at, free, _) in enumerate(found) if at == row]
        short, stands = mapped_row(embeds[row], valid[row], own)
        positions_short = ids[..., row : row + 1, :][..., stands]
        if positions == "compact":
            positions_short = torch.arange(len(stands))[None]
        hidden = model.model.language_model(
            inputs_embeds=short[None], position_ids=positions_short,
            attention_mask=torch.ones(1, len(stands)), use_cache=False,
        ).last_hidden_state  # fmt: skip
        oracle.assert_close(logits[row, stands], model.lm_head(hidden)[0])
        there = torch.zeros_like(valid[row])
        there[stands] = True
        assert torch.equal(run.trace.index[row] >= 0, there)
        assert set(run.trace.sequence_per_layer[row]) == {len(stands)}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_merged_token_is_not_a_kept_one(family: str, models: Any) -> None:
    # Guards the test above: pooling changes the result, it does not only drop.
    model, inputs = models(family), batch(family)
    with visprune.prune(model, "pool", num_keep=4) as run:
        pooled = model(**inputs).logits
    kept = run.trace.kept
    keep = inputs["attention_mask"].bool().clone()
    for (row, free, _), tokens in zip(places(family, inputs), kept, strict=True):
        keep[row, free] = False
        keep[row, free[tokens]] = True
    layers = len(model.model.language_model.layers)
    dropped = oracle.hidden_logits(model, inputs, [keep] * layers)
    assert oracle.error(pooled[:2, -1], dropped[:2, -1]) > 1e-3
