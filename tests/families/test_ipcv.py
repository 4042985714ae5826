# SPDX-License-Identifier: Apache-2.0
"""IPCV inside the image encoders of families: fewer patches there, every token behind them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.contract.oracle import alive, error, forwards
from tests.contract.test_removal import state
from tests.encoders.test_ipcv import back_by_hand, chosen_by_hand
from tests.families.claimed import build
from tests.families.claimed import inputs as inputs_of
from tests.families.oracle import hidden_logits, two_kernels
from tests.families.test_reduced_towers import (
    PRECISE,
    TINY,
    attended,
    mapped,
    rows_of,
    written_out,
)
from visprune.backbones.vlm.known import JOINED
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.find import find_adapter

# The tiny LLaVA-NeXT-Video reads the first of two layers: there is nothing to save before it.
FIRST_READ = ("llava_next_video",)
FAMILIES = ("llava", "llava_next", *(name for name in TINY if name not in FIRST_READ))
PARAMS: dict[str, Any] = {"keep_ratio": 0.35, "layer": 1, "top_k": 4}
KEEP = 12  # of 36 patches
every_family = pytest.mark.parametrize("family", FAMILIES)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


class Following:
    """An encoder's layers under the rule; behind the one that is read all patches are back.

    Args:
        prefix: tokens before the patches.
        end: the layer that is read.
        steady: how many layers attend to all patches.
    """

    def __init__(self, prefix: int, end: int, steady: int) -> None:
        self.prefix, self.end, self.steady = prefix, end, steady

    def layer(self, number: int, block: Any, hidden: Tensor) -> Tensor:
        """In place of a layer's forward: goes on with what the one before left."""
        first, at = self.prefix, PARAMS["layer"]
        if number == 0:
            self.x, self.rows = hidden, []
        if number == at:
            self.start = self.x
            each = zip(self.x[:, first:], self.before[:, first:], strict=True)
            self.rows = [chosen_by_hand(a, b, KEEP, PARAMS["top_k"]) for a, b in each]
        away = at <= number <= self.end
        x, everybody = self.x, number == at
        if away and number >= at + self.steady and everybody:
            x, everybody = self.cut(x), False
        if away and number < at + self.steady and not everybody:
            x, everybody = self.back(x), True
        self.before = x
        x = attended(block, x, torch.zeros(x.shape[:2]))[0]
        x = mapped(block, self.cut(x) if away and everybody else x)
        self.x = self.back(x) if number == self.end else x
        return self.back(x) if away else x

    def cut(self, x: Tensor) -> Tensor:
        """The patches that stay."""
        first = self.prefix
        each = zip(x, self.rows, strict=True)
        return torch.stack([torch.cat([r[:first], r[first:][kept]]) for r, (kept, _) in each])

    def back(self, x: Tensor) -> Tensor:
        """All of them, of those that stayed."""
        first = self.prefix
        each = zip(x, self.start, self.rows, strict=True)
        return torch.stack([
            torch.cat([r[:first], back_by_hand(kept, near, start[first:], r[first:])])
            for r, start, (kept, near) in each
        ])  # fmt: skip


@every_family
@torch.no_grad()
def test_keeping_all_is_bit_equal(family: str, models: Any) -> None:
    model, inputs = models(family), inputs_of(family, rows_of(family))
    plain, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    before = state(model)
    for steady in (0, 1):
        method = {"keep_ratio": 1.0, "layer": 1, "attention_stabilization": steady}
        with visprune.prune(model, "ipcv", **method) as run:
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(model.generate(**inputs, **GREEDY), answer)
            assert run.encoder.reducer.latest.away is not None
    assert state(model) == before


@pytest.mark.parametrize("steady", [0, 1])
@every_family
@torch.no_grad()
def test_a_family_equals_its_encoder_written_out(family: str, steady: int, models: Any) -> None:
    model, inputs = models(family, "eager"), inputs_of(family, rows_of(family))
    adapter, valid = find_adapter(model), inputs["attention_mask"].bool()
    plain, layers = model(**inputs).logits, len(adapter.encoder.layers)
    before = state(model)
    with (
        forwards() as seen,
        visprune.prune(model, "ipcv", attention_stabilization=steady, **PARAMS) as run,
    ):
        logits, trace = model(**inputs).logits, run.trace
        latest = run.encoder.reducer.latest
        alone = []
        for row, prompt in enumerate(rows_of(family)):
            own = model(**inputs_of(family, [prompt])).logits[0]
            alone.append(error(logits[row, valid[row]], own))
        answer = model.generate(**inputs, **GREEDY)
    assert max(alone) <= PRECISE
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert state(model) == before
    assert torch.equal(model(**inputs).logits, plain)

    # Really shorter, layer by layer; and the decoder reads every token.
    end = adapter.encoder_end
    want = [(36 if n < 1 or n < 1 + steady or n > end else KEEP,
             36 if n < 1 or n > end else KEEP) for n in range(layers)]  # fmt: skip
    assert [(latest.attended[n], latest.mapped[n]) for n in range(layers)] == want
    assert trace.stages[0]["encoder"] == want
    assert all(bool(there[valid].all()) for there in alive(seen[0]))
    assert [len(kept) for kept in trace.kept] == trace.num_tokens

    assert not torch.equal(logits, plain)
    by_hand = Following(adapter.encoder.prefix, end, steady)
    with written_out(model, by_hand.layer):
        want_logits = hidden_logits(model, inputs, alive(seen[0]))
    allowed = PRECISE + two_kernels(family, model, inputs, plain)
    assert error(logits[valid], want_logits[valid]) <= allowed


@pytest.mark.parametrize("steady", [0, 1])
@pytest.mark.parametrize("family", ["llava", "internvl", "llava_onevision", "paligemma"])
@torch.no_grad()
def test_the_cost_is_what_a_counter_counts(family: str, steady: int, models: Any) -> None:
    model, inputs = models(family, "eager"), inputs_of(family, [[3, "a", 6]])
    with visprune.prune(model, "keep_all") as run:
        whole = run.cost(inputs, causal="dense")
    options = {"use_cache": False, "logits_to_keep": 1}
    with visprune.prune(model, "ipcv", attention_stabilization=steady, **PARAMS) as run:
        cost = run.cost(inputs, causal="dense")
        with FlopCounterMode(display=False) as counter:
            model(**inputs, **options)
    tiles = sum(frames for grids in run.trace.grids for frames, _, _ in grids)
    distances = tiles * (36 - KEEP) * KEEP * run.adapter.encoder.width  # of the rule's own
    counted = counter.get_total_flops() / 2 - distances
    assert math.isclose(counted, cost.macs - cost.selection, rel_tol=1e-3)
    assert cost.vision < whole.vision
    assert cost.selection > 0
    assert (cost.prefill, cost.projector) == (whole.prefill, whole.projector)


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("behind", ["divprune", "v2drop"])
@torch.no_grad()
def test_a_method_behind_it_prunes_what_comes_back(family: str, behind: str, models: Any) -> None:
    model, inputs = models(family), inputs_of(family, [[3, "a", 6]])
    inside = visprune.get_method("ipcv", attention_stabilization=1, **PARAMS)
    shown: list[Tensor] = []
    both = [inside, visprune.get_method(behind, num_keep=4)]
    with visprune.prune(model, both) as run:
        run.observe(lambda site, tokens, *more: shown.append(tokens.features))
        logits, kept, cost = model(**inputs).logits, run.kept, run.cost(inputs)
    with visprune.prune(model, inside) as run:
        only = run.cost(inputs)
    assert bool(torch.isfinite(logits).all())
    assert [len(one) for one in kept] == [4]
    assert (shown[0].shape[1], shown[1].shape[1]) == (36, sum(run.trace.num_tokens))
    assert (cost.vision, cost.projector) == (only.vision, only.projector)
    assert cost.prefill < only.prefill


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_gradients_come_through(family: str) -> None:
    model, inputs = build(family), inputs_of(family, rows_of(family))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with visprune.prune(model, "ipcv", attention_stabilization=0, **PARAMS):
        model(**inputs, labels=labels).loss.backward()
    block = find_adapter(model).encoder.layers[0].block
    grads = [p.grad for p in block.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert any(bool(g.any()) for g in grads if g is not None)


def test_what_it_is_refused_on(models: Any) -> None:
    assert "internvl" in JOINED  # where methods that drop are refused, and this one is not
    for family in ("qwen2_vl", "qwen3_vl", "idefics2"):
        with pytest.raises(UnsupportedModel, match=r"ipcv acts inside the image encoder.*be red"):
            visprune.prune(models(family), "ipcv")
    with pytest.raises(ConfigError, match=r"behind encoder layer 1, whose output is read"):
        visprune.prune(models("llava"), "ipcv", layer=2)
    for family in FIRST_READ:
        with pytest.raises(ConfigError, match=r"the first: no layer is left to save\."):
            visprune.prune(models(family), "ipcv")
    with pytest.raises(ConfigError, match="fastervlm is shown ClsAttention"):
        visprune.prune(models("llava"), "ipcv+fastervlm", num_keep=4)
