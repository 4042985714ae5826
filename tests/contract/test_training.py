# SPDX-License-Identifier: Apache-2.0
"""Plain forward and training: logits keep their shape, labels work, gradients flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import visprune
from tests import tiny
from tests.contract import oracle
from tests.contract.cases import NO_BUDGET, batch, every_family, every_pair, few

ROWS = [[3, "a", 6], [2, "b", 9]]
TOWERS = {"llava": "vision_tower", "llava_next": "vision_tower", "qwen2_vl": "visual",
          "qwen2_5_vl": "visual"}  # fmt: skip


def labelled(family: str) -> dict[str, Any]:
    """Inputs whose labels are all text, the word right after the picture too."""
    inputs = batch(family, ROWS)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.IMAGE)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~text, -100)}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_pair
def test_loss_is_that_of_the_kept_rows(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), labelled(family)
    model.zero_grad()
    with oracle.forwards() as seen, visprune.prune(model, name, **few(name)) as run:
        out = model(**inputs)
        out.loss.backward()
    grads = gradients(model)
    model.zero_grad()
    there = oracle.alive(seen[0])[-1]
    labels = inputs["labels"][:, 1:]
    asked = (labels != -100) & there[:, :-1]
    want = functional.cross_entropy(out.logits[:, :-1][asked], labels[asked])
    assert torch.allclose(out.loss, want, rtol=1e-5)
    lost = int(((labels != -100) & ~there[:, :-1]).sum())
    assert run.trace.ignored_labels == lost
    if name in ("fastv", "uniform"):
        assert lost > 0  # a word after a picture, whose last patch left
    assert out.logits.shape == (*inputs["input_ids"].shape, tiny.VOCAB)
    assert torch.equal(run.trace.index >= 0, there)
    assert bool(out.logits.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in grads.values())
    flows = [n for n, g in grads.items() if float(g.abs().max()) > 0]
    for part in (TOWERS[family], "language_model.layers.0.", "language_model.layers.3.", "lm_head"):
        assert any(part in n for n in flows), part


@every_pair
def test_keep_all_has_the_same_loss_and_gradients(name: str, family: str, models: Any) -> None:
    if name not in ("keep_all", "fastv", "pool"):
        name = "keep_all"  # gradients of the others take the same two paths
    model, inputs = models(family), labelled(family)
    params = {} if name == "keep_all" else {"keep_ratio": 1.0}
    found = []
    for pruned in (False, True):
        model.zero_grad()
        run = visprune.prune(model, name, **params) if pruned else None
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
        if run is not None:
            assert run.trace.ignored_labels == 0
            run.remove()
    model.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for key, want in found[0][1].items():
        assert oracle.error(found[1][1][key], want) <= 1e-5


@every_family
@pytest.mark.parametrize("name", ["todre", "fastv", "pyramiddrop", "uniform"])
def test_gradients_are_those_of_hidden_keys(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), labelled(family)
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    model.zero_grad()
    with oracle.forwards() as seen, visprune.prune(model, name, **few(name, positions="original")):
        model(**inputs).loss.backward()
    got = gradients(model)
    model.zero_grad()
    keep, labels = oracle.alive(seen[0]), inputs["labels"][:, 1:]
    with oracle.hiding(model, keep, inputs["attention_mask"].bool()):
        logits = model(**plain, use_cache=False).logits
    asked = (labels != -100) & keep[-1][:, :-1]
    functional.cross_entropy(logits[:, :-1][asked], labels[asked]).backward()
    want = gradients(model)
    model.zero_grad()
    assert got.keys() == want.keys()
    for key, grad in want.items():
        assert oracle.error(got[key], grad) <= 1e-4, key


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["todre", "fastv", "pyramiddrop", "pool"])
@every_family
def test_gradient_checkpointing_changes_nothing(name: str, family: str, reentrant: bool) -> None:
    model, inputs = tiny.build(family).train(), labelled(family)
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with visprune.prune(model, name, **few(name)) as run:
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
        found.append((loss.detach(), gradients(model), run.trace.tokens_per_layer))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][2] == found[1][2]
    for key, want in found[0][1].items():
        if reentrant and key not in found[1][1]:
            # A re-entrant checkpoint gives no gradient to layers whose input needs none.
            assert TOWERS[family] in key
            continue
        assert oracle.error(found[1][1][key], want) <= 1e-5, key


@every_family
def test_backward_after_removal(family: str, models: Any) -> None:
    model, inputs = models(family), labelled(family)
    model.zero_grad()
    with visprune.prune(model, "fastv", num_keep=5):
        model(**inputs).loss.backward()
    want = gradients(model)
    model.zero_grad()
    with visprune.prune(model, "fastv", num_keep=5):
        loss = model(**inputs).loss
    loss.backward()
    for key, grad in gradients(model).items():
        assert torch.equal(grad, want[key])
    model.zero_grad()


# Outputs -------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_only_the_last_logits(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, ROWS)
    with visprune.prune(model, "fastv", num_keep=5):
        whole = model(**inputs).logits
        assert oracle.error(model(**inputs, logits_to_keep=1).logits, whole[:, -1:]) <= 1e-6
        assert oracle.error(model(**inputs, logits_to_keep=4).logits, whole[:, -4:]) <= 1e-6


@every_family
@torch.no_grad()
def test_tuples_and_inner_states(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, ROWS)
    with oracle.forwards() as seen, visprune.prune(model, "fastv", num_keep=5) as run:
        want = model(**inputs).logits.nan_to_num()
        assert torch.equal(model(**inputs, return_dict=False)[0].nan_to_num(), want)
        out = model(**inputs, output_hidden_states=True)
        assert torch.equal(out.logits.nan_to_num(), want)
    # Inner states have the length of the input: entry i is what layer i was handed, before its own
    # stage, and the row of a token that is gone repeats the one before.
    assert {h.shape[1] for h in out.hidden_states} == {inputs["input_ids"].shape[1]}
    keep = oracle.alive(seen[0])
    for number, states in enumerate(out.hidden_states):
        there = keep[number - 1] if number else torch.ones_like(keep[0])
        for row, column in (~there & inputs["attention_mask"].bool()).nonzero().tolist():
            before = int(there[row, :column].nonzero().max())
            assert torch.equal(states[row, column], states[row, before])
    assert run.trace.index is not None
    assert torch.equal(run.trace.index >= 0, keep[-1])


@every_family
@torch.no_grad()
def test_the_base_model_keeps_its_shape(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, ROWS)
    with oracle.forwards() as seen, visprune.prune(model, "uniform", num_keep=5):
        hidden = model.model(**inputs).last_hidden_state
        logits = model(**inputs).logits
    there = oracle.alive(seen[0])[-1]
    assert hidden.shape[:2] == inputs["input_ids"].shape
    assert bool(hidden.isfinite().all())
    # The head called by hand gives what it gives inside.
    assert torch.allclose(model.lm_head(hidden), logits, atol=1e-4)
    assert torch.allclose(model.lm_head(hidden[there]), logits[there], atol=1e-4)


@every_pair
@torch.no_grad()
def test_half_precision_runs(name: str, family: str) -> None:
    model = tiny.build(family).to(torch.bfloat16)
    inputs = batch(family)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    want = model(**inputs).logits
    with visprune.prune(model, "keep_all"):
        assert torch.equal(model(**inputs).logits, want)
    with oracle.forwards() as seen, visprune.prune(model, name, **few(name)) as run:
        got = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert got.dtype == torch.bfloat16
    there = oracle.alive(seen[0])[-1] & inputs["attention_mask"].bool()
    assert bool(got[there].isfinite().all())
    if name not in NO_BUDGET and name != "pool":
        assert [len(kept) for kept in run.trace.kept] == [5, 5, 5]
