# SPDX-License-Identifier: Apache-2.0
"""`visprune.check` on every family, and on adapters that are wrong in one point each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests import tiny as four
from tests.families import tiny
from tests.families.claimed import KINDS
from visprune.backbones.vlm.generic import GenericAdapter
from visprune.core.slots import SlotTable
from visprune.errors import ConfigError, UnsupportedKernel, UnsupportedModel
from visprune.machine.check import contract
from visprune.machine.check.hide import without
from visprune.machine.check.report import Report, Row, difference
from visprune.machine.decoder.forward import Forward

PROMISES = [
    "keep all = untouched",
    "drop = hide",
    "generate = one forward",
    "batch = singles",
    "removed = untouched",
]
PROMPT = [[3, "a", 6]]


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name in KINDS])
def test_a_family_of_every_kind_is_safe(family: str, models: Any) -> None:
    model = models(family)
    report = visprune.check(model, tiny.inputs(family, PROMPT))
    assert report.safe, report
    recurrent = tiny.FAMILIES[family].recurrent
    promises = [("drop = absent" if recurrent and "hide" in x else x) for x in PROMISES]
    assert [row.name for row in report.rows] == promises
    assert all(row.holds for row in report.rows)
    assert all((row.effect is None) == (row.name in PROMISES[::4]) for row in report.rows)
    whole, pruned = report.tokens
    assert len(whole) == len(pruned) == model.config.get_text_config().num_hidden_layers
    assert pruned[-1] < pruned[0] < whole[0] == whole[-1]
    assert 0 < report.cache[1] < report.cache[0]
    assert str(report).endswith("safe to prune")


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_batch_in_half_precision(family: str, attn: str) -> None:
    model = four.build(family, attn=attn).to(torch.bfloat16)
    inputs = four.inputs(family, [[3, "a", 6], [2, "b", 4, "c", 3], [5]])
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    before = model.training, {k: v.clone() for k, v in model.state_dict().items()}
    report = visprune.check(model, inputs)
    assert report.safe, report
    assert "bfloat16 on cpu, attention " + attn in report.setting
    assert model.training == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())


def test_a_model_in_training_is_left_so(models: Any) -> None:
    model = tiny.build("qwen3_vl").train()
    model.model.visual.eval()
    assert visprune.check(model, tiny.inputs("qwen3_vl", PROMPT)).safe
    assert model.training
    assert not model.model.visual.training
    assert not visprune.runs(model)


# Teeth: one point wrong ----------------------------------------------------------------------


def test_forgotten_deepstack_features_are_caught(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = GenericAdapter.later_features

    def wrong(self: Any, kwargs: dict[str, Any]) -> Any:
        kwargs, later = right(self, kwargs)
        return kwargs, {layer: torch.zeros_like(one) for layer, one in later.items()}

    monkeypatch.setattr(GenericAdapter, "later_features", wrong)
    report = visprune.check(models("qwen3_vl"), tiny.inputs("qwen3_vl", PROMPT))
    assert not report.safe
    assert str(report.first_failure).startswith("keep all = untouched: differs by ")
    named = report.rows[1].note
    assert "Decoder layer 0 was given the right states, positions and mask" in named


def test_windows_that_count_slots_are_caught(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = GenericAdapter.window

    def wrong(self: Any, layer: int) -> int | None:
        size = right(self, layer)
        return None if size is None else size - 6  # as many tokens as left before

    monkeypatch.setattr(GenericAdapter, "window", wrong)
    report = visprune.check(models("gemma3"), tiny.inputs("gemma3", PROMPT))
    assert [row.holds for row in report.rows[:3]] == [False, True, False]  # decoding alone
    assert "generate = one forward" in {r.name for r in report.rows if r.holds is False}


def test_a_wrong_mask_is_caught_and_named(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by_place = Forward._by_place  # type: ignore[attr-defined]

    def wrong(self: Forward, layer: int, dtype: torch.dtype) -> Any:
        mask = by_place(self, layer, dtype)
        if mask is None or layer != 2 or not self.table.shortened:
            return mask
        return mask.roll(1, dims=-1)

    monkeypatch.setattr(Forward, "_by_place", wrong)
    report = visprune.check(models("gemma3"), tiny.inputs("gemma3", PROMPT))
    assert not report.safe
    assert report.first_failure is not None
    assert report.first_failure.startswith("drop = hide: differs by")
    assert "The mask of decoder layer 2 shows other tokens" in report.first_failure
    assert "not safe to prune: drop = hide" in str(report)


def test_wrong_positions_are_caught_and_named(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Forward, table: Any, layer: int) -> Tensor:
        ids = self.full_positions()
        return ids[..., : table.num_slots].expand(*ids.shape[:-2], table.index.shape[0], -1)

    monkeypatch.setattr(Forward, "table_positions", wrong)
    for family in ("qwen3_vl", "internvl"):
        report = visprune.check(models(family), tiny.inputs(family, PROMPT))
        assert not report.safe
        assert report.rows[0].holds  # nothing dropped, nothing wrong
        assert report.first_failure is not None
        assert "The positions that decoder layer 0 is given are not its tokens'" in (
            report.first_failure
        )


def test_other_tokens_than_those_are_caught_and_named(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = SlotTable.gather

    def wrong(self: SlotTable, rel: Tensor, real: Tensor) -> SlotTable:
        found = gather(self, rel, real)
        return SlotTable(**{**vars(found), "index": found.index.clamp(min=1)})

    monkeypatch.setattr(SlotTable, "gather", wrong)
    report = visprune.check(models("mistral3"), tiny.inputs("mistral3", PROMPT))
    assert not report.safe
    assert "The states that enter the decoder are not those of the tokens that stay" in str(report)


def test_what_cannot_run_is_not_safe(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Forward, table: Any, layer: int) -> Tensor:
        raise IndexError("index 7 is out of bounds")

    monkeypatch.setattr(Forward, "table_positions", wrong)
    report = visprune.check(models("internvl"), tiny.inputs("internvl", PROMPT))
    assert not report.safe
    assert str(report).endswith("not safe to prune: index 7 is out of bounds")


def test_a_kernel_without_masks_says_what_was_not_compared(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, states = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, 8)
    with pytest.raises(UnsupportedKernel, match="takes no 4-D mask"):
        without(torch.ones(1, 5), keep, states)  # FlashAttention's, of padding

    def refused(layers: Any, keep: Any) -> Any:
        without(torch.ones(1, 5), keep[0], states)

    monkeypatch.setattr(contract, "hiding", refused)
    report = visprune.check(models("internvl"), tiny.inputs("internvl", PROMPT))
    assert report.rows[1].holds is None
    assert report.safe  # by what can be compared, and that is said
    assert "safe to prune (not checked: drop = hide, The attention kernel" in str(report)


def test_bad_input_is_refused(models: Any) -> None:
    model, inputs = models("internvl"), tiny.inputs("internvl", PROMPT)
    with visprune.prune(model, "random", num_keep=3), pytest.raises(ConfigError, match="untouched"):
        visprune.check(model, inputs)
    with pytest.raises(ConfigError, match="a prompt with a picture"):
        visprune.check(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ConfigError, match="Nothing says which processor"):
        visprune.check(model)
    with pytest.raises(UnsupportedModel, match="prune takes a model"):
        visprune.check(3, inputs)
    with pytest.raises(ConfigError, match="There is no model 'embeded'"):
        visprune.check("embeded")


# The report ----------------------------------------------------------------------------------


def test_a_difference_is_relative_and_sees_what_is_not_finite() -> None:
    want = torch.tensor([1.0, -100.0, float("-inf")])
    assert difference(torch.tensor([1.0, -99.0, 5.0]), want) == pytest.approx(0.01)
    assert difference(torch.tensor([float("nan"), 0.0, 0.0]), want) == float("inf")
    assert difference(torch.zeros(2), want) == float("inf")


def test_a_comparison_that_rounding_drowns_proves_nothing() -> None:
    report = Report("M", "S", "A", [Row("drop = hide", 0.001, 0.1, "", effect=0.05)])
    assert not report.safe
    assert report.first_failure is None
    assert report.verdict.startswith("not shown to be safe: drop = hide: dropping moves it by")
    report.rows.append(Row("batch = singles", 0.2, 0.1, effect=3.0))
    assert "not safe to prune: batch = singles: differs by 2.0e-01" in str(report)


def test_nothing_checked_is_not_safe() -> None:
    assert not Report("M", "S", "A").safe
    assert not Report("M", "S", "A", [Row("keep all = untouched", 0.0, 1e-5)]).safe


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl", "nemotron_h_omni", "gemma4", "gemma3n"])
def test_states_windows_and_streams_in_half_precision(family: str) -> None:
    model = tiny.build(family).to(torch.bfloat16)
    inputs = tiny.inputs(family, [[3, "a", 6], [2, "b", 4], [5]])
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    report = visprune.check(model, inputs)
    assert report.safe, report
    assert all(row.effect is None or row.effect > row.found for row in report.rows)
