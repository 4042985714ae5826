# SPDX-License-Identifier: Apache-2.0
"""What holds of evictions whatever a layer shows: budgets, what is protected, what merges keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import visprune
from tests.contract.cases import CACHE
from tests.unit.test_cache_golden import kept, look, shown
from visprune.core.cache import (
    CacheMethod,
    Compensate,
    Gated,
    JointHeads,
    Looked,
    MergeNearest,
    MergeNeighbours,
    Pyramid,
    Recurring,
)
from visprune.core.method import ModelSpec
from visprune.methods.adakv import AdaKV
from visprune.methods.pyramidkv import PyramidKV

LAYERS, HEADS, DIM = 4, 2, 4
SPEC = ModelSpec("llava", num_layers=LAYERS, has_cls=True, multi_axis_rope=False)
# They decide themselves, take a share alone, turn vectors, or ask for modules of their own.
OTHER = ("zipvl", "think", "zipcache", "kvquant", "actqkv", "tokenselect", "expected_attention",
         "learned", "vl_cache")  # fmt: skip
BUDGETED = [name for name in CACHE if name not in OTHER]

prompts = st.tuples(
    st.integers(1, 6), st.integers(1, 30), st.integers(1, 8), st.integers(0, 999)
)  # text before, visual tokens, text behind, seed
some = settings(max_examples=6, deadline=None)


def layers(prompt: tuple[int, int, int, int]) -> tuple[list[Any], Tensor]:
    """What the layers of a random prompt show, and which of its slots are visual."""
    before, count, behind, seed = prompt
    length, made = before + count + behind, torch.Generator().manual_seed(seed)
    steps = torch.arange(length)
    visual = (steps >= before) & (steps < before + count)
    found = []
    for layer in range(LAYERS):
        q = torch.randn(2 * HEADS, length, DIM, generator=made)
        k, v = torch.randn(2, HEADS, length, DIM, generator=made)
        found.append(shown(q, k, v, visual=visual, layer=layer, num_layers=LAYERS))
    return found, visual


def chosen(method: CacheMethod, prompt: Any) -> tuple[list[Looked], list[list[Tensor]], Tensor]:
    seen, visual = layers(prompt)
    looked = [look(method, one, SPEC) for one in seen]
    return looked, kept(method, *looked, spec=SPEC), visual


@pytest.mark.parametrize("name", BUDGETED)
@given(prompt=prompts, num=st.integers(1, 40))
@some
def test_budgets_of_layers_and_heads_and_what_is_protected(
    name: str, prompt: tuple[int, int, int, int], num: int
) -> None:
    method = visprune.get_method(name, max_cache=prompt[0] + prompt[2] + num)
    assert isinstance(method, CacheMethod)
    _, found, visual = chosen(method, prompt)
    text, wanted = set((~visual).nonzero()[:, 0].tolist()), min(num, int(visual.sum()))
    budget = method.eviction(SPEC).budget
    counts = torch.tensor([[len(index) - len(text) for index in heads] for heads in found])
    assert counts.shape == (LAYERS, HEADS)
    for index in (index for heads in found for index in heads):
        assert index.tolist() == sorted(set(index.tolist()))  # in order, each once
        assert text <= set(index.tolist())
    assert bool((counts <= visual.sum()).all())
    if isinstance(budget, Gated):
        assert set(counts.flatten().tolist()) <= {wanted, int(visual.sum())}
    elif isinstance(budget, JointHeads):  # the rounding of every head
        assert bool(((counts.sum(1) - HEADS * wanted).abs() <= HEADS).all())
    elif (
        type(budget).__name__ in ("Pyramid", "ByPrefix", "ByVariance")
        or "Layer" in type(budget).__name__
    ):
        assert len({tuple(row.tolist()) for row in counts.T}) == 1  # heads of a layer alike
        assert float(counts.float().mean()) <= wanted + LAYERS
    else:
        assert set(counts.flatten().tolist()) == {wanted}


@given(prompt=prompts, more=st.integers(0, 20))
@some
def test_sinks_and_recent_slots_of_a_prompt_stay(
    prompt: tuple[int, int, int, int], more: int
) -> None:
    length = sum(prompt[:3])
    for name in ("h2o", "tova", "streaming_llm"):
        kind: Any = visprune.get_method(name, max_cache=length, scope="prompt")
        recent = min(3, length)
        params = {"recent": recent} if name == "h2o" else {}
        size = min(length, recent + more)
        method = type(kind)(max_cache=size, scope="prompt", **params)
        assert isinstance(method, Recurring)
        _, found, _ = chosen(method, prompt)
        for index in (index for heads in found for index in heads):
            assert len(index) == size
            if name == "h2o":
                assert set(range(length - recent, length)) <= set(index.tolist())


@given(prompt=prompts, num=st.integers(1, 12))
@some
def test_a_pyramid_and_joint_heads_share_the_same_amount(
    prompt: tuple[int, int, int, int], num: int
) -> None:
    free, size = prompt[1], prompt[0] + prompt[2] + num
    for method in (PyramidKV(max_cache=size), AdaKV(max_cache=size, floor=0.0)):
        _, found, visual = chosen(method, prompt)
        text = int((~visual).sum())
        total = sum(len(index) - text for heads in found for index in heads)
        budget = method.eviction(SPEC).budget
        slack = LAYERS * HEADS * (3 if isinstance(budget, Pyramid) else 1)
        assert abs(total - LAYERS * HEADS * min(num, free)) <= slack


def test_of_equal_scores_the_first_stay() -> None:
    free = torch.tensor([False, *[True] * 6, False])
    looked = Looked(torch.zeros(HEADS, 8), free, 3, 8)
    found = looked.kept(torch.tensor([2, 4]))
    assert [index.tolist() for index in found] == [[0, 1, 2, 7], [0, 1, 2, 3, 4, 7]]


# Merges ------------------------------------------------------------------------------------------


@given(count=st.integers(4, 40), stay=st.integers(1, 4), seed=st.integers(0, 999))
@some
def test_merges_conserve_what_they_weigh(count: int, stay: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, HEADS, count, DIM, generator=made)
    score = torch.randn(HEADS, count, generator=made)
    looked = Looked(score, torch.ones(count, dtype=torch.bool), stay, count)
    index = [x.sort().values for x in looked.ranked()[:, :stay]]
    for action in (Compensate(), MergeNeighbours()):
        for head in action.apply(key, value, index, looked):
            bias = torch.zeros(len(head.key)) if head.bias is None else head.bias
            assert math.isclose(float(bias.exp().sum()), count, rel_tol=1e-4)  # each slot once
    # An average weighs all that came to it alike: sizes times means are the sum of all.
    for head, at in enumerate(index):
        unit = torch.nn.functional.normalize(key[head], dim=-1)
        gone = torch.tensor([n for n in range(count) if n not in at.tolist()])
        size = torch.ones(stay)
        if len(gone):
            size += torch.bincount((unit[gone] @ unit[at].T).argmax(1), minlength=stay)
        merged = MergeNearest("average", free_only=False).apply(key, value, index, looked)[head]
        for mine, whole in ((merged.key, key[head]), (merged.value, value[head])):
            total = (mine * size[:, None]).sum(0)
            torch.testing.assert_close(total, whole.sum(0), rtol=1e-4, atol=1e-4)
