# SPDX-License-Identifier: Apache-2.0
"""Compiled vision-language models are pruned like others; export says that it cannot follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import visprune
from tests import tiny
from tests.contract.cases import few
from visprune.errors import UnsupportedModel


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def prompt(text: int) -> dict[str, Any]:
    return tiny.inputs("llava", [[2, "a", text]])


@torch.no_grad()
def test_a_model_that_was_compiled_and_has_run() -> None:
    model, name = tiny.build("llava"), "fastv"
    compiled = torch.compile(model, backend="eager")
    dense = compiled(**prompt(4)).logits
    with visprune.prune(compiled, name, **few(name)):
        assert torch.equal(compiled(**prompt(4)).logits, model(**prompt(4)).logits)
        assert not torch.equal(compiled(**prompt(4)).logits, dense)
    assert torch.allclose(compiled(**prompt(4)).logits, dense, atol=1e-6)


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@torch.no_grad()
def test_graphs_do_not_grow_with_the_prompt(name: str) -> None:
    model = tiny.build("llava")
    compiled, found = torch.compile(model, backend="eager"), []
    with visprune.prune(model, name, **few(name)):
        for text in range(3, 8):
            want = model(**prompt(text)).logits
            assert torch.equal(compiled(**prompt(text)).logits, want)
            found.append(counters["stats"]["unique_graphs"])
    assert found[-1] == found[-2] == found[-3]  # a second graph of any length, and no more


def test_export_is_refused_in_a_sentence() -> None:
    model = tiny.build("llava")
    inputs = {**prompt(4), "use_cache": False}
    with visprune.prune(model, "divprune", num_keep=5):
        with pytest.raises(UnsupportedModel, match=r"torch.export cannot follow divprune.*remove"):
            torch.export.export(model, (), kwargs=inputs, strict=False)
        assert model(**inputs).logits.isfinite().all()  # the run is none the worse
