# SPDX-License-Identifier: Apache-2.0
"""A method that brings modules to a stage inside the decoder: shown, saved, chained, refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import visprune
from tests.contract.cases import batch
from tests.contract.test_removal import state
from visprune.errors import ConfigError

SMALL: dict[str, Any] = {"num_keep": 5, "width": 16, "heads": 2, "hidden": 24}


def taught(run: Any) -> None:
    """A predictor that no longer counts as new."""
    with torch.no_grad():
        for parameter in run.learned.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))


@torch.no_grad()
def test_the_choice_is_the_predictors(models: Any) -> None:
    """What enters layer 2, picture by picture, through the module that the run shows."""
    torch.manual_seed(3)
    model, inputs = models("llava"), batch("llava")
    before, seen = state(model), []
    with visprune.prune(model, "dynamic_llava", **SMALL) as run:
        taught(run)
        assert model.visprune_learned is run.learned
        names = [name for name, _ in model.named_parameters() if "visprune_learned" in name]
        assert len(names) == len(list(run.learned.parameters())) == 32
        end = run.observe(lambda site, tokens, ctx, chosen, _: seen.append((tokens, chosen)))
        model(**inputs)
        end()
        assert seen
        for tokens, chosen in seen:
            logits = run.learned[0](tokens.features)
            margin = logits[..., 0] - logits[..., 1]
            want = margin.argsort(dim=1, descending=True, stable=True)[:, :5].sort(dim=1).values
            assert torch.equal(chosen.index, want)
            alone = run.learned[0](tokens.features[:1])
            torch.testing.assert_close(alone, logits[:1], rtol=1e-4, atol=1e-5)
    assert state(model) == before
    assert not hasattr(model, "visprune_learned")


@torch.no_grad()
def test_saved_and_loaded_and_copied(models: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, inputs = models("llava"), batch("llava")
    with visprune.prune(model, "dynamic_llava", **SMALL) as run:
        taught(run)
        want, kept = model(**inputs).logits, [k.tolist() for k in run.trace.kept]
        visprune.save_pretrained(run, tmp_path)
        twin = copy.deepcopy(model)
        assert twin.visprune_learned is not run.learned
        for parameter in run.learned.parameters():
            parameter.zero_()
        assert torch.equal(twin(**inputs).logits, want)
    again, loaded = visprune.load_pretrained(tmp_path)
    assert loaded is not None
    got = again.eval()(**inputs).logits
    assert [k.tolist() for k in loaded.trace.kept] == kept
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_an_untrained_predictor_says_so_once(models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    with visprune.prune(model, "dynamic_llava", **SMALL) as run:
        with pytest.warns(UserWarning, match="new and picks tokens at random"):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
        learned = run.learned
        taught(run)
        kept = run.trace.kept and [model(**inputs), run.trace.kept][1]
    with visprune.prune(model, "dynamic_llava", learned=learned, **SMALL) as run:
        model(**inputs)
        assert run.learned is learned
        assert all(torch.equal(a, b) for a, b in zip(run.trace.kept, kept, strict=True))


@torch.no_grad()
def test_in_a_chain(models: Any) -> None:
    """It gets its own module behind another member; two that learn are refused."""
    model, inputs = models("llava"), batch("llava")
    first = visprune.get_method("divprune", num_keep=12)
    second = visprune.get_method("dynamic_llava", **SMALL)
    with visprune.prune(model, [first, second]) as run:
        taught(run)
        model(**inputs)
        assert [len(kept) for kept in run.trace.kept] == [5] * len(run.trace.kept)
    before = state(model)
    other = visprune.get_method("dynamic_llava", **{**SMALL, "num_keep": 3, "layer": 3})
    inside = visprune.get_method("dynamicvit", num_keep=12)
    for members in ([second, other], [inside, second]):
        with pytest.raises(ConfigError, match="a run holds those of one"):
            visprune.prune(model, members)
        assert state(model) == before


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"width": 10}, "multiple of 4 and of heads; got width=10"),
        ({"heads": 3}, "got width=16, heads=3"),
        ({"hidden": 0}, "hidden=0"),
    ],
)
def test_refused(params: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        visprune.get_method("dynamic_llava", **{**SMALL, **params})


def test_a_predictor_of_another_kind_is_refused(models: Any) -> None:
    with pytest.raises(ConfigError, match="a ModuleList of one predictor; got Linear"):
        visprune.prune(models("llava"), "dynamic_llava", learned=torch.nn.Linear(2, 2), **SMALL)
