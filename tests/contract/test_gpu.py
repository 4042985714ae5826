# SPDX-License-Identifier: Apache-2.0
"""Pruning on a CUDA device: every method on every family gives what it gives on the CPU.

Run where there is one with ``pytest -m gpu``; elsewhere pytest counts these as deselected.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import visprune
from tests.contract.cases import (
    FAMILIES,
    batch,
    every_dropping_pair,
    every_family,
    every_pair,
    everything,
    few,
)
from tests.contract.test_generate import GREEDY, STEPS

pytestmark = pytest.mark.gpu


def there(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same inputs on the device, pixels in ``dtype``."""
    return {
        key: value.to("cuda", dtype) if dtype and value.is_floating_point() else value.cuda()
        for key, value in inputs.items()
    }


@pytest.fixture(autouse=True)
def convolutions_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch lets cuDNN use TF32: Qwen's patches differ by 1e-3 from the CPU's without pruning."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def copies(models: Any) -> Iterator[Any]:
    """``copies(family)``: the tiny model of the CPU tests, on the device."""
    made = {family: copy.deepcopy(models(family)).cuda() for family in FAMILIES}
    yield lambda family: made[family]
    made.clear()


@every_pair
@torch.no_grad()
def test_keeping_all_is_bit_equal(name: str, family: str, copies: Any) -> None:
    model, inputs = copies(family), there(batch(family))
    want = model(**inputs).logits
    with visprune.prune(model, name, **everything(name)):
        assert torch.equal(model(**inputs).logits, want)
    assert torch.equal(model(**inputs).logits, want)


@every_pair
@torch.no_grad()
def test_answers_and_kept_tokens_are_those_of_the_cpu(
    name: str, family: str, models: Any, copies: Any
) -> None:
    found = []
    for model, inputs in (
        (models(family), batch(family)),
        (copies(family), there(batch(family))),
    ):
        with visprune.prune(model, name, **few(name)):
            torch.manual_seed(3)
            logits = model(**inputs).logits.cpu()
            torch.manual_seed(3)
            found.append((logits, model.generate(**inputs, **GREEDY).cpu()))
    (want, words), (got, same_words) = found
    # Logits of a dropped token are NaN: the kept ones are compared too.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert torch.equal(same_words, words)


@every_dropping_pair
@torch.no_grad()
def test_a_batch_of_half_precision_answers_and_is_restored(
    name: str, family: str, copies: Any
) -> None:
    model = copy.deepcopy(copies(family)).to(torch.bfloat16)
    inputs = there(batch(family), torch.bfloat16)
    want = model(**inputs).logits
    with visprune.prune(model, name, **few(name)):
        assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + STEPS
    assert torch.equal(model(**inputs).logits, want)


@every_family
def test_gradients_flow_through_a_pruned_model(family: str, copies: Any) -> None:
    model, inputs = copy.deepcopy(copies(family)), there(batch(family))
    with visprune.prune(model, "todre", **few("todre")):
        model(**inputs).logits.float().square().mean().backward()
    grads = [p.grad for p in model.model.language_model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
