# SPDX-License-Identifier: Apache-2.0
"""Choosing needs tensors and nothing else, and can be watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import visprune
from tests import tiny
from visprune.core import (
    Budget,
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.errors import BudgetError, ConfigError
from visprune.machine.choose import choose

STAGE = Stage(Site.projector(), Budget(keep_ratio=0.5))


def tokens(batch: int = 2, count: int = 8) -> VisualTokens:
    torch.manual_seed(0)
    x = torch.randn(batch, count, 4)
    pos = torch.zeros(batch, count, 3, dtype=torch.int64)
    return VisualTokens(x, torch.ones(batch, count), pos)


def test_a_method_chooses_without_a_model() -> None:
    method = visprune.get_method("divprune", keep_ratio=0.5)
    selection = choose(method, STAGE, tokens(), Context())
    assert selection.num_slots == 4
    assert selection.size.tolist() == [[1.0] * 4] * 2
    assert selection.macs == method.macs(8, 4, 4) > 0


def test_the_budget_is_of_what_the_image_had_at_first() -> None:
    method = visprune.get_method("uniform", keep_ratio=0.5)
    assert choose(method, STAGE, tokens(), Context(original=12)).num_slots == 6
    assert choose(method, STAGE, tokens(), Context(original=99)).num_slots == 8
    strict = visprune.get_method("uniform", num_keep=9, strict=True)
    with pytest.raises(BudgetError, match="exceeds the 8 visual tokens"):
        choose(strict, Stage(Site.projector(), Budget(num_keep=9)), tokens(), Context())


@dataclass(frozen=True, kw_only=True)
class Adaptive(PruningMethod):
    """Keeps what is above zero in its first feature."""

    name: ClassVar[str] = "adaptive"

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage without a budget."""
        return (Stage(Site.projector()),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """By a mask."""
        return Selection.where(tokens.features[..., 0] > 0)


def test_images_keep_their_own_number() -> None:
    given = tokens(3)
    given.features[1, :, 0] = -1.0
    selection = choose(Adaptive(), Stage(Site.projector()), given, Context())
    want = (given.features[..., 0] > 0).sum(1).tolist()
    assert selection.counts == want
    assert want[1] == 0
    for row in range(3):
        alone = selection.row(row)
        assert alone.index.shape == (1, want[row])
        assert torch.equal(alone.reduce(given.features[row : row + 1])[0],
                           given.features[row][given.features[row, :, 0] > 0])  # fmt: skip
    padded = selection.reduce(given.features)
    assert not bool(padded[1].any())


@torch.no_grad()
def test_adaptive_counts_in_a_model() -> None:
    model = tiny.build("llava")
    inputs = tiny.inputs("llava", [[2, "a", 4], [2, "b", 4], [3]])
    with visprune.prune(model, Adaptive()) as run:
        together = model(**inputs).logits
        kept = [len(k) for k in run.trace.kept]
        assert [row[0] for row in run.trace.tokens_per_layer] == [*kept, 0]
        for row, prompt in enumerate([[2, "a", 4], [2, "b", 4]]):
            alone = model(**tiny.inputs("llava", [prompt])).logits[0]
            valid = inputs["attention_mask"][row].bool()
            assert torch.allclose(together[row, valid], alone, atol=1e-4)


def test_observers_see_every_choice() -> None:
    found: list[Any] = []
    method = visprune.get_method("uniform", keep_ratio=0.5)
    selection = choose(method, STAGE, tokens(), Context(), [lambda *seen: found.append(seen)])
    ((site, shown, context, chosen, seconds),) = found
    assert (str(site), shown.num_tokens, context.num_keep) == ("projector", 8, 4)
    assert chosen is selection
    assert seconds > 0


@torch.no_grad()
def test_a_run_is_observed() -> None:
    model, inputs = tiny.build("llava"), tiny.inputs("llava", [[2, "a", 4]])
    with visprune.prune(model, "pyramiddrop", num_keep=4) as run:
        model(**inputs)
        assert run.trace.selection_seconds == 0.0
        found: list[str] = []
        end = run.observe(lambda site, *rest: found.append(str(site)))
        model(**inputs)
        assert found == [stage["site"] for stage in run.trace.stages]
        assert run.trace.selection_seconds > 0.0
        end()
        model(**inputs)
        assert len(found) == len(run.trace.stages)


def test_a_selection_of_other_tokens_is_refused() -> None:
    class Wrong(Adaptive):
        def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
            return Selection.identity(1, 3)

    with pytest.raises(ConfigError, match="given 2 x 8 tokens and returned a selection of 1 x 3"):
        choose(Wrong(), Stage(Site.projector()), tokens(), Context())
