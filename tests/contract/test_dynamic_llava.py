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
from tests.contract import oracle
from tests.contract.cases import batch
from tests.contract.test_removal import state
from tests.families import tiny as family_tiny
from visprune.errors import ConfigError
from visprune.methods.dynamic_llava import DynamicLLaVA

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
    with pytest.raises(ConfigError, match="a ModuleList of 1 predictor; got Linear"):
        visprune.prune(models("llava"), "dynamic_llava", learned=torch.nn.Linear(2, 2), **SMALL)


def _decided(model: Any, run: Any, inputs: dict[str, Any], new: torch.Tensor) -> tuple[Any, ...]:
    """Logits of each token that is fed one by one, and what the second predictor said of it."""
    said, logits = [], []
    hook = run.learned[1].register_forward_hook(lambda m, a, out: said.append(out))
    done = model(**inputs, use_cache=True)
    cache, given = done.past_key_values, inputs
    for number in range(new.shape[1]):
        step = oracle.step(model, given, new[:, number : number + 1])
        logits.append(model(**step, past_key_values=cache, use_cache=True).logits[:, 0])
        given = oracle.extended(given, new[:, number : number + 1])
    hook.remove()
    stays = torch.stack([one[..., 0] > one[..., 1] for one in said], dim=1)
    return torch.stack(logits, dim=1), stays, cache


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("rows", [[[3, "a", 6]], [[3, "a", 6], [2, "b", 4, "a", 3]]])
@torch.no_grad()
def test_what_is_not_stored_of_an_answer_is_hidden(
    family: str, rows: list[list[Any]], models: Any
) -> None:
    torch.manual_seed(11)
    model, inputs = models(family), batch(family, rows)
    new = torch.randint(3, 80, (len(rows), 8))
    with (
        oracle.forwards() as seen,
        visprune.prune(model, "dynamic_llava", text=True, **SMALL) as run,
    ):
        taught(run)
        for _ in range(20):  # until it says both
            for parameter in run.learned[1].parameters():
                parameter.copy_(torch.randn(parameter.shape))
            logits, stays, cache = _decided(model, run, inputs, new)
            if stays.any() and not stays.all():
                break
        assert run.trace.unstored == int((~stays).sum())
    assert stays.any()
    assert not stays.all()
    keep = oracle.grown(oracle.alive(seen[-1]), inputs["input_ids"].shape[1] + 8)
    keep = [one.clone() for one in keep]
    for layer in (2, 3):
        keep[layer][:, -8:] = stays
    want = oracle.hidden_logits(model, oracle.extended(inputs, new), keep)
    oracle.assert_close(logits, want[:, -8:])
    prompt = [layer.keys.shape[2] for layer in cache.layers]
    left = int(stays.any(0).sum())  # what no row stores takes no slot
    assert prompt[0] - prompt[2] >= 8 - left
    everything = oracle.hidden_logits(
        model, oracle.extended(inputs, new), oracle.grown(oracle.alive(seen[-1]), want.shape[1])
    )
    assert oracle.error(everything[:, -8:], want[:, -8:]) > 1e-3


@torch.no_grad()
def test_published_weights_are_found_by_name(models: Any) -> None:
    torch.manual_seed(12)
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    with visprune.prune(model, "dynamic_llava", text=True, **SMALL) as run:
        taught(run)
        names = ("model.image_score_predictor.", "model.output_text_score_predictor.")
        published = {"model.norm.weight": torch.ones(3)}
        for name, module in zip(names, run.learned, strict=True):
            published |= {name + key: value.clone() for key, value in module.state_dict().items()}
        want = model(**inputs).logits
    method = DynamicLLaVA.from_state(published, heads=2, num_keep=5)
    assert (method.width, method.hidden, method.text) == (16, 24, True)
    with visprune.prune(model, method):
        assert torch.equal(model(**inputs).logits, want)
    assert DynamicLLaVA.from_state(published, heads=2).keep_ratio == 0.2
    image = {name: value for name, value in published.items() if "output_text" not in name}
    with pytest.raises(ConfigError, match="no predictor of answers"):
        DynamicLLaVA.from_state(image)
    assert DynamicLLaVA.from_state(image, heads=2, text=False).text is False
    with pytest.raises(ConfigError, match=r"no image_score_predictor\.down_mlp"):
        DynamicLLaVA.from_state({"model.norm.weight": torch.ones(3)}, text=False)
    wrong = {**image, "model.image_score_predictor.more": torch.ones(2)}
    with pytest.raises(ConfigError, match="Weights of another predictor"):
        DynamicLLaVA.from_state(wrong, heads=2, text=False)


def test_answers_are_thinned_where_that_is_defined(models: Any) -> None:
    method = visprune.get_method("dynamic_llava", text=True, **SMALL)
    chain = [method, visprune.get_method("snapkv", num_keep=4)]
    with pytest.raises(ConfigError, match="a cache from which another method evicts"):
        visprune.prune(models("llava"), chain)
    with pytest.raises(visprune.UnsupportedModel, match="recurrent layers of qwen3_5"):
        visprune.prune(family_tiny.build("qwen3_5"), method)
    learned = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match="a ModuleList of 2 predictors"):
        visprune.prune(models("llava"), "dynamic_llava", text=True, learned=learned, **SMALL)
