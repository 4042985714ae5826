# SPDX-License-Identifier: Apache-2.0
"""A sample's result does not depend on its neighbours, on padding, or on the run before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.contract import oracle
from tests.contract.cases import (
    BY_PLACE,
    LINE_FAMILIES,
    batch,
    every_family,
    every_pair,
    few,
    prompts,
)

PRECISE = 2e-5  # sums of another batch and length run in another order


def alone(family: str, row: list[Any]) -> dict[str, Any]:
    return batch(family, [row])


def placed(name: str, family: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """With the positions that tokens have alone, for a method whose choice depends on them."""
    if name not in BY_PLACE or family not in LINE_FAMILIES:
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("pad_side", ["left", "right"])
@every_pair
@torch.no_grad()
def test_a_batch_equals_its_samples_alone(
    name: str, family: str, pad_side: str, models: Any
) -> None:
    model, rows = models(family), prompts(family)
    inputs = placed(name, family, batch(family, rows, pad_side=pad_side))
    valid = inputs["attention_mask"].bool()
    with visprune.prune(model, name, **few(name)) as run:
        together, trace = model(**inputs).logits, run.trace
        kept: list[Any] = []
        for number, row in enumerate(rows):
            single = model(**alone(family, row)).logits[0]
            whole = together[number, valid[number]]
            assert torch.equal(single.isnan(), whole.isnan())
            there = ~single.isnan()
            assert oracle.error(whole[there], single[there]) <= PRECISE
            if any(isinstance(part, str) for part in row):
                kept += run.trace.kept
                assert run.trace.tokens_per_layer == [trace.tokens_per_layer[number]]
    assert [k.tolist() for k in trace.kept] == [k.tolist() for k in kept]
    # Padding was never computed with: its rows are no result.
    assert bool(torch.isfinite(together[valid][~together[valid].isnan()]).all())


@every_pair
@torch.no_grad()
def test_more_left_padding_changes_nothing(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    padded = {**inputs}
    for key, value in (("input_ids", 0), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        if key in inputs:
            padded[key] = torch.nn.functional.pad(inputs[key], (7, 0), value=value)
    with visprune.prune(model, name, **few(name)) as run:
        want, kept = model(**inputs).logits, [k.tolist() for k in run.trace.kept]
        got = model(**placed(name, family, padded)).logits
        assert [k.tolist() for k in run.trace.kept] == kept
        one = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        two = model.generate(**padded, max_new_tokens=4, do_sample=False)[:, -4:]
    there = ~want.isnan()
    assert oracle.error(got[:, 7:][there], want[there]) <= PRECISE
    assert torch.equal(one, two)


@every_pair
@torch.no_grad()
def test_twice_is_equal(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    found = []
    for _ in range(2):
        with visprune.prune(model, name, **few(name)) as run:
            for _ in range(2):
                found.append((model(**inputs).logits.nan_to_num(), run.trace))
    for logits, trace in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert trace.stages == found[0][1].stages
        assert all(torch.equal(a, b) for a, b in zip(trace.kept, found[0][1].kept, strict=True))


@every_family
@torch.no_grad()
def test_random_draws_from_its_seed_and_the_picture(family: str, models: Any) -> None:
    model = models(family)
    rows = [[3, "a", 6], [2, "b", 4, "a", 3]]

    def kept(rows: list[list[Any]], **params: Any) -> list[list[int]]:
        with visprune.prune(model, "random", num_keep=5, **params) as run:
            model(**batch(family, rows))
        return [k.tolist() for k in run.trace.kept]

    first = kept(rows)
    assert first[0] == first[2]  # the same picture in another row
    assert first[0] != first[1]  # another picture of the same size
    assert kept(rows[::-1])[2] == first[0]
    assert kept([[9, "a", 1]]) == [first[0]]
    torch.manual_seed(1234)
    assert kept(rows) == first
    assert kept(rows, seed=1) != first


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "todre"])
@pytest.mark.parametrize("family", LINE_FAMILIES)
@torch.no_grad()
def test_without_a_mask_or_with_a_mask_of_ones(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6], [3, "b", 6]])
    with visprune.prune(model, name, **few(name)):
        want = model(**inputs).logits
        bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
        assert oracle.error(model(**bare).logits.nan_to_num(), want.nan_to_num()) <= PRECISE
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        given = {k: v for k, v in inputs.items() if k != "input_ids"}
        got = model(inputs_embeds=embeds, **given).logits
        assert oracle.error(got.nan_to_num(), want.nan_to_num()) <= PRECISE


@every_family
@pytest.mark.parametrize("additive", [True, False])
@torch.no_grad()
def test_a_mask_of_the_user_in_four_dimensions(family: str, additive: bool, models: Any) -> None:
    # Only the decoder sees it; pictures are found by their placeholders.
    model, inputs = models(family), batch(family, [[3, "a", 6], [3, "b", 6]])
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    mask[:, :, length - 1, 1] = False  # the last token may not look at the second
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    if family.startswith("qwen"):
        ids = model.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"],
        )[0]  # fmt: skip
        inputs["position_ids"] = ids
    plain = {**inputs}
    inputs = {**inputs, "attention_mask": mask}
    with visprune.prune(model, "keep_all"):
        assert torch.equal(model(**inputs).logits, want := model(**inputs).logits)
    assert torch.equal(want, model(**inputs).logits)
    assert oracle.error(want[:, -1], model(**plain).logits[:, -1]) > 1e-4
    for name in ("fastv", "uniform"):
        with oracle.forwards() as seen, visprune.prune(model, name, num_keep=5):
            got = model(**inputs).logits
        keep = oracle.alive(seen[0])
        visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        want_there = oracle.hidden_logits(model, plain, keep, extra=visible)[keep[-1]]
        oracle.assert_close(got[keep[-1]], want_there)
