# SPDX-License-Identifier: Apache-2.0
"""Keeping all is bit-equal; dropping a token equals hiding it as a key from that layer on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.contract import oracle
from tests.contract.cases import (
    DROPPING,
    LINE_FAMILIES,
    batch,
    every_dropping_pair,
    every_lossless_pair,
    everything,
    few,
)

attentions = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@attentions
@every_lossless_pair
def test_keep_all_is_bit_equal(name: str, family: str, attn: str, models: Any) -> None:
    model, inputs = models(family, attn), batch(family)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    with torch.no_grad():
        plain, cached = model(**inputs), model.generate(**inputs, **options)
        with oracle.forwards() as seen, visprune.prune(model, name, **everything(name)) as run:
            pruned, generated = model(**inputs), model.generate(**inputs, **options)
    assert len(seen) == 2  # the whole path ran, in forward and in generate
    assert seen[0].entered
    assert run.trace.num_tokens == [len(kept) for kept in run.trace.kept]
    assert torch.equal(plain.logits, pruned.logits)
    assert torch.equal(cached.sequences, generated.sequences)
    for want, got in zip(cached.logits, generated.logits, strict=True):
        assert torch.equal(want, got)


@attentions
@every_dropping_pair
def test_drop_equals_hide_as_key(name: str, family: str, attn: str, models: Any) -> None:
    model, inputs = models(family, attn), batch(family)
    params = few(name, positions="original")
    with oracle.forwards() as seen, visprune.prune(model, name, **params) as run, torch.no_grad():
        logits = model(**inputs).logits
    keep = oracle.alive(seen[0])
    want = oracle.hidden_logits(model, inputs, keep)
    there = keep[-1] & inputs["attention_mask"].bool()
    assert logits.shape == want.shape
    assert bool((~there).any())
    oracle.assert_close(logits[there], want[there])
    # The row of a dropped token is that of the last one before it that is still there.
    assert torch.equal(run.trace.index >= 0, keep[-1])
    for row, column in (~keep[-1] & inputs["attention_mask"].bool()).nonzero().tolist():
        before = int(keep[-1][row, :column].nonzero().max())
        assert torch.equal(logits[row, column], logits[row, before])
    valid = inputs["attention_mask"].bool()
    counts = [[int((k & valid)[row].sum()) for k in keep] for row in range(3)]
    assert run.trace.sequence_per_layer == counts


@pytest.mark.parametrize(("name", "family"), [p for p in DROPPING if p[1] in LINE_FAMILIES])
def test_compact_positions_close_up(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    params = few(name, positions="compact")
    with oracle.forwards() as seen, visprune.prune(model, name, **params) as run, torch.no_grad():
        logits = model(**inputs).logits
    assert run.trace.positions == "compact"
    keep = oracle.alive(seen[0])
    want = oracle.hidden_logits(model, inputs, keep, compact=True)
    there = keep[-1] & inputs["attention_mask"].bool()
    oracle.assert_close(logits[there], want[there])
    # It is another computation than with the original positions.
    original = oracle.hidden_logits(model, inputs, keep)
    assert oracle.error(original[there], want[there]) > 1e-3
