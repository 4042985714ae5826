# SPDX-License-Identifier: Apache-2.0
"""Tokens that leave inside the image encoders of families beside LLaVA, written out by layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visprune
from tests.contract.oracle import alive, error, forwards
from tests.contract.test_removal import state
from tests.encoders.oracle import matched_by_hand
from tests.families import tiny
from tests.families.oracle import hidden_logits, two_kernels
from visprune.backbones.vlm.known import FIRST, JOINED, KNOWN, READ, REDUCED
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.encoder.tap import listening
from visprune.machine.encoder.within_vlm import _made_of, _one_of_alike
from visprune.machine.find import find_adapter
from visprune.machine.plan import fitting

FAMILIES = tuple(name for name in REDUCED if name not in FIRST)
ONE_BY_ONE = tuple(name for name in FAMILIES if name not in JOINED)
CLIPS = ("llava_onevision", "llava_next_video")
# With a picture in crops and one that is scaled down behind the encoder.
TINY = (*FAMILIES, "llava_onevision_shrunk")
ROWS: list[list[Any]] = [[3, "a", 6], [2, "B", 4]]
PRECISE = 2e-5  # sums of another batch and length run in another order
R = 6  # of 36 patches, in each of two layers

every_family = pytest.mark.parametrize("family", TINY)


def rows_of(family: str) -> list[list[Any]]:
    """A batch of two, the longer one with a clip where there are clips."""
    return [[3, "a", 6], [2, "B", 4, "v", 3]] if family in CLIPS else ROWS


def part(block: nn.Module, *names: str) -> Any:
    """The first of a layer's parts that it has."""
    return next(getattr(block, name) for name in names if hasattr(block, name))


def attended(block: Any, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of a plain layer, and its keys ``[P, H, T, d]``."""
    attn = part(block, "self_attn", "attention")
    rows = part(block, "layer_norm1", "layernorm_before")(x)
    query, key, value = (
        p(rows).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for p in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    mixed = (scores + bias[:, None, None]).softmax(-1) @ value
    out = part(attn, "out_proj", "projection_layer")(mixed.transpose(1, 2).flatten(2))
    return x + getattr(block, "lambda_1", 1.0) * out, key


def mapped(block: Any, x: Tensor) -> Tensor:
    """The second half."""
    rows = part(block, "layer_norm2", "layernorm_after")(x)
    return x + getattr(block, "lambda_2", 1.0) * block.mlp(rows)


class Merging:
    """An encoder's layers with ToMe between their halves; each gives back the whole grid.

    Attributes:
        slot: of every patch behind the layer that is read, ``[P, N]``, of every encoding.
    """

    def __init__(self, prefix: int, r: int, end: int) -> None:
        self.prefix, self.r, self.end = prefix, r, end
        self.slot: list[Tensor] = []

    def layer(self, number: int, block: Any, hidden: Tensor) -> Tensor:
        """In place of a layer's forward: goes on with what the one before left."""
        first = self.prefix
        if number == 0:
            self.x, patches = hidden, hidden[:, first:, 0]
            self.size = torch.ones(patches.shape)
            self.at = torch.arange(patches.shape[1]).expand(patches.shape)
        bias = nn.functional.pad(self.size, (first, 0), value=1.0).log()
        x, key = attended(block, self.x, bias)
        chosen = matched_by_hand(key[:, :, first:].mean(1), self.size, self.r, first)
        matrix = chosen.matrix()
        self.size = ((matrix > 0).float() @ self.size[..., None])[..., 0]
        self.at = chosen.dest().gather(1, self.at)
        self.x = mapped(block, torch.cat([x[:, :first], matrix @ x[:, first:]], dim=1))
        if number == self.end:
            self.slot.append(self.at)
        patches = self.x[:, first:].gather(1, self.at[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([self.x[:, :first], patches], dim=1)


class Hiding:
    """An encoder's layers without the keys of the patches that have left.

    Args:
        prefix: tokens before the patches.
        seen: patches of each layer's attention, by encoding and layer, ``[P, N]`` bool.
    """

    def __init__(self, prefix: int, seen: list[list[Tensor]]) -> None:
        self.prefix, self.seen, self.call = prefix, seen, -1

    def layer(self, number: int, block: Any, hidden: Tensor) -> Tensor:
        """In place of a layer's forward."""
        self.call += number == 0
        there = nn.functional.pad(self.seen[self.call][number], (self.prefix, 0), value=True)
        bias = torch.zeros(there.shape).masked_fill(~there, float("-inf"))
        return mapped(block, attended(block, hidden, bias)[0])


@contextmanager
def written_out(model: Any, layer: Callable[..., Tensor]) -> Iterator[None]:
    """Layers of the untouched encoder computed by hand."""
    blocks = [one.block for one in find_adapter(model).encoder.layers]

    def forward(number: int, block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer(number, block, hidden_states)

    for number, block in enumerate(blocks):
        block.forward = partial(forward, number, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def made_of(model: Any, inputs: dict[str, Any], slot: list[Tensor]) -> list[list[tuple[Any, ...]]]:
    """What each free token of each piece of a picture is made of, in slots and parts of them."""
    with listening(find_adapter(model)) as heard:
        model(**inputs)
    found, calls = [], iter(slot)
    kind, own = None, torch.empty(0)
    for piece in heard:
        if piece.kind != kind:
            kind, at = piece.kind, next(calls)
            own = (torch.arange(len(at))[:, None] * at.shape[1] + at).flatten()
        assert piece.source is not None
        parts = own[piece.source.reshape(len(piece.source), -1)].tolist()
        if piece.weight is None:
            found.append([tuple(one) for one in parts])
            continue
        whole = []
        for slots, weights in zip(parts, piece.weight.tolist(), strict=True):
            each: dict[int, float] = {}
            for at, weight in zip(slots, weights, strict=True):
                each[at] = each.get(at, 0.0) + round(weight, 6)
            whole.append(tuple(sorted((k, round(w, 6)) for k, w in each.items() if w > 0)))
        found.append(whole)
    return found


def test_every_family_that_can_be_reduced_can_be_read() -> None:
    assert set(REDUCED) <= set(READ) & set(KNOWN)
    for family in FAMILIES:
        adapter = find_adapter(tiny.build(family))
        assert (adapter.merge > 1) == (family in JOINED)
        assert fitting(adapter.spec) == next(
            row for row in visprune.list_models("vlm") if row.name == family
        ).methods  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@every_family
@torch.no_grad()
def test_merging_nothing_is_bit_equal(family: str, attn: str, models: Any) -> None:
    model, inputs = models(family, attn), tiny.inputs(family, rows_of(family))
    options = {"max_new_tokens": 3, "do_sample": False}
    plain, answer = model(**inputs).logits, model.generate(**inputs, **options)
    with visprune.prune(model, "tome", r=0) as run:
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, **options), answer)
        assert run.encoder.reducer.latest.selections
    assert run.trace.num_tokens == [len(kept) for kept in run.trace.kept]


@every_family
@torch.no_grad()
def test_merging_equals_the_encoder_written_out(family: str, models: Any) -> None:
    model, inputs = models(family, "eager"), tiny.inputs(family, rows_of(family))
    adapter, before = find_adapter(model), state(models(family, "eager"))
    plain = model(**inputs).logits
    with forwards() as seen, visprune.prune(model, "tome", r=R) as run:
        logits, trace = model(**inputs).logits, run.trace
        entered = dict(run.encoder.reducer.latest.mapped)
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    # Really shorter: what the MLPs of the encoder were given.
    assert entered == {n: 36 - (n + 1) * R for n in range(len(entered))}
    assert len(entered) == len(adapter.encoder.layers)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert state(model) == before
    assert torch.equal(model(**inputs).logits, plain)

    by_hand = Merging(adapter.encoder.prefix, R, adapter.encoder_end)
    keep = alive(seen[0])
    with written_out(model, by_hand.layer):
        dense = model(**inputs).logits
        slots, by_hand.slot = by_hand.slot, []
        want = hidden_logits(model, inputs, keep)
    assert {len(row.unique()) for at in slots for row in at} == {36 - (adapter.encoder_end + 1) * R}
    there = keep[-1] & inputs["attention_mask"].bool()
    allowed = PRECISE + two_kernels(family, model, inputs, plain)
    assert error(logits[there], want[there]) <= allowed

    # One token of each kind is left, and nothing else leaves.
    pieces = made_of(model, inputs, slots)
    joined = [one for piece in pieces for one in piece]
    assert len(joined) == sum(trace.num_tokens)
    assert sum(len(set(piece)) for piece in pieces) == sum(len(kept) for kept in trace.kept)
    if all(len(kept) == count for kept, count in zip(trace.kept, trace.num_tokens, strict=True)):
        assert error(logits[there], dense[there]) <= allowed


@every_family
@torch.no_grad()
def test_a_batch_is_its_samples(family: str, models: Any) -> None:
    model, rows = models(family), rows_of(family)
    inputs = tiny.inputs(family, rows)
    valid = inputs["attention_mask"].bool()
    with visprune.prune(model, "pitome", keep_ratio=0.8) as run:
        logits, kept = model(**inputs).logits, [k.tolist() for k in run.kept]
        alone = []
        for row, prompt in enumerate(rows):
            own = model(**tiny.inputs(family, [prompt])).logits[0]
            assert error(logits[row, valid[row]], own) <= PRECISE
            alone += [k.tolist() for k in run.kept]
    assert kept == alone


@pytest.mark.parametrize("family", ONE_BY_ONE)
@torch.no_grad()
def test_dropping_equals_hiding_in_encoder_and_decoder(family: str, models: Any) -> None:
    model, inputs = models(family, "eager"), tiny.inputs(family, ROWS)
    adapter = find_adapter(model)
    plain = model(**inputs).logits
    with forwards() as seen, visprune.prune(model, "spatten", keep_ratio=0.5, front=0.0) as run:
        logits, latest = model(**inputs).logits, run.encoder.reducer.latest
    layers = range(len(adapter.encoder.layers))
    kept = [latest.composed(n - 1).index for n in layers]
    masks = [torch.zeros(latest.batch, 36, dtype=torch.bool).scatter(1, k, True) for k in kept]
    keep = alive(seen[0])
    assert bool((keep[0] < inputs["attention_mask"].bool()).any())
    with written_out(model, Hiding(adapter.encoder.prefix, [masks] * 2).layer):
        want = hidden_logits(model, inputs, keep)
    there = keep[-1] & inputs["attention_mask"].bool()
    assert error(logits[there], want[there]) <= PRECISE + two_kernels(family, model, inputs, plain)


DROPPING = {"spatten": {"keep_ratio": 0.5}, "dynamicvit": {"num_keep": 12}}


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("family", JOINED)
def test_dropping_is_refused_where_blocks_are_joined(name: str, family: str, models: Any) -> None:
    model = models(family)
    before = state(model)
    why = r"leaves patches without a value.*joined from 2 x 2 patches.*Methods that fit it: .*tome"
    with pytest.raises(UnsupportedModel, match=why):
        visprune.prune(model, name, **DROPPING[name])
    assert state(model) == before


@pytest.mark.parametrize(
    ("family", "row"),
    [("llava_onevision", [2, "v", 3]), ("llava_next_video", [2, "v", 3]),
     ("llava_onevision_shrunk", [2, "B", 3])],
)  # fmt: skip
@torch.no_grad()
def test_dropping_is_refused_of_what_is_scaled(family: str, row: list[Any], models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [row])
    plain = model(**inputs).logits
    with visprune.prune(model, "spatten", keep_ratio=0.5, front=0.0):
        with pytest.raises(UnsupportedModel, match="one that was dropped has no value"):
            model(**inputs)
        if not family.endswith("shrunk"):
            assert len(model(**tiny.inputs(family, [[2, "a", 3]])).logits) == 1  # one by one
    assert torch.equal(model(**inputs).logits, plain)


def test_another_layer_of_the_encoder_is_refused(models: Any) -> None:
    model, inputs = models("internvl"), tiny.inputs("internvl", ROWS)
    with (
        visprune.prune(model, "tome", r=2),
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"reads encoder layer -2.*reads -1"),
    ):
        model(**inputs, vision_feature_layer=-2)


def test_several_layers_are_refused(models: Any) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"joins the outputs of encoder layers \[-1, -2, 1\]"
    ):
        visprune.prune(models("vipllava"), "tome", r=2)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "idefics3"])
@torch.no_grad()
def test_the_cost_of_the_encoder_falls(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, rows_of(family))
    with visprune.prune(model, "keep_all") as run:
        whole = run.cost(inputs)
    with visprune.prune(model, "tome", r=R) as run:
        less = run.cost(inputs)
    assert less.vision < whole.vision
    assert less.selection > 0
    assert less.prefill <= whole.prefill
    if family in JOINED:  # the projector has the whole grid
        assert less.projector == whole.projector
    else:
        assert less.projector * 36 == whole.projector * (36 - 2 * R)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_gradients_come_through(family: str) -> None:
    model, inputs = tiny.build(family), tiny.inputs(family, ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with visprune.prune(model, "tome", r=R):
        model(**inputs, labels=labels).loss.backward()
    block = find_adapter(model).encoder.layers[0].block
    grads = [p.grad for p in block.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert any(bool(g.any()) for g in grads if g is not None)


def test_one_of_alike() -> None:
    slot = torch.tensor([[3, 3], [1, 2], [3, 3], [2, 1], [1, 2], [5, 5]])
    first, count = _one_of_alike(_made_of(slot, None))
    assert first.tolist() == [0, 1, 3, 5]
    assert count.tolist() == [2.0, 2.0, 1.0, 1.0]
    part_of = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [1.0, 0]])
    first, count = _one_of_alike(_made_of(slot, part_of))
    assert first.tolist() == [0, 1, 3, 4, 5]
    assert count.tolist() == [2.0, 1.0, 1.0, 1.0, 1.0]
