# SPDX-License-Identifier: Apache-2.0
"""A reduced encoder compiles as one graph, and compiled code knows which method is in force."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import visprune
from tests.encoders import hf, oracle, small
from tests.encoders.test_elsewhere import answer, built
from visprune.errors import UnsupportedModel


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "method", "params"),
    [
        ("plain", "tome", {"r": 3}),
        ("plain", "evit", {"keep_ratio": 0.6}),
        ("eva_rope", "topk", {"keep_ratio": 0.6}),
        ("average_no_class", "pitome", {"keep_ratio": 0.8}),
        ("plain", "random", {"keep_ratio": 0.6}),
        ("plain", "spatten", {"keep_ratio": 0.6}),
        ("plain", "diffrate", {}),
        ("plain", "ficoco_v", {"r": 3}),
        ("plain", "ipcv", {"keep_ratio": 0.4, "attention_stabilization": 1}),
    ],
)
def test_one_graph(kind: str, method: str, params: dict[str, Any]) -> None:
    model = small.small(small.KINDS[kind], 2)
    x = small.picture(model)
    with visprune.prune(model, method, **params) as run, torch.no_grad():
        want, kept = model(x), torch.stack(run.kept)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        oracle.assert_close(compiled(x), want)
        assert torch.equal(torch.stack(run.kept), kept)
        other = small.picture(model, seed=9)
        oracle.assert_close(compiled(other), model(other))


def test_it_need_not_have_run_before() -> None:
    model = small.small(small.KINDS["plain"], 2)
    x = small.picture(model)
    with torch.no_grad():
        with visprune.prune(model, "tome", r=3):
            want = model(x)
        fresh = copy.deepcopy(model)
        with visprune.prune(fresh, "tome", r=3):
            compiled = torch.compile(fresh, fullgraph=True, backend="aot_eager")
            torch._dynamo.utils.counters.clear()
            for _ in range(3):
                oracle.assert_close(compiled(x), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


ORDERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "dense first": [("", {}), ("random", {"keep_ratio": 0.4}), ("evit", {}), ("tome", {"r": 3})],
    "pruned first": [("tome", {"r": 3}), ("random", {"keep_ratio": 0.4}), ("topk", {"num_keep": 9}),
                     ("", {}), ("tome", {"r": 5})],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "copies"), [("dense first", False), ("dense first", True), ("pruned first", False)]
)
@torch.no_grad()
def test_methods_one_after_another(order: str, copies: bool) -> None:
    model = small.shrunk(small.KINDS["plain"])
    x = small.picture(model)
    compiled = torch.compile(model, backend="aot_eager")
    for method, params in ORDERS[order]:
        if copies:
            model = copy.deepcopy(model)
            compiled = torch.compile(model, backend="aot_eager")
        run = visprune.prune(model, method, **params) if method else None
        oracle.assert_close(compiled(x), model(x))
        if run is not None:
            run.remove()


@torch.no_grad()
def test_more_methods_than_dynamo_compiles() -> None:
    model = small.shrunk(small.KINDS["plain"])
    x = small.picture(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for ratio in (1.0, 0.9, 0.8, 0.5):
            with visprune.prune(model, "topk", keep_ratio=ratio):
                oracle.assert_close(compiled(x), model(x))
            oracle.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_an_encoder_of_transformers_that_was_compiled_before() -> None:
    model = built("clip")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="aot_eager")
    dense = answer(compiled, x)
    for method, params in (("topk", {"keep_ratio": 0.5}), ("tome", {"r": 3})):
        with visprune.prune(model, method, **params):
            got = answer(compiled, x)
            oracle.assert_close(got, answer(model, x))
        assert not torch.equal(got, dense)
        oracle.assert_close(answer(compiled, x), dense)


def test_a_forward_of_the_user_stays() -> None:
    model = small.shrunk(small.KINDS["plain"])
    norm, block = model.blocks[0].norm1, model.blocks[1]
    norm.forward = mine = norm.forward
    with visprune.prune(model, "tome", r=3):
        assert vars(norm)["forward"] is mine
        block.forward = theirs = functools.partial(block.forward)
    assert vars(norm)["forward"] is mine
    assert vars(block)["forward"] is theirs
    assert "forward" not in vars(model.blocks[0])


@torch.no_grad()
def test_random_tokens_are_drawn_inside_one_graph() -> None:
    model = small.small(small.KINDS["plain"], 2)
    frames = torch._dynamo.testing.CompileCounter()
    with visprune.prune(model, "random", keep_ratio=0.6) as run:
        compiled = torch.compile(model, fullgraph=True, backend=frames)
        for seed in range(12):  # each picture has a number of its own
            x = small.picture(model, seed=seed)
            oracle.assert_close(compiled(x), model(x))
        assert frames.frame_count <= 2  # of a run that has not run yet, and of one that has
        kept = torch.stack(run.kept)
        traced = torch.jit.trace(model, small.picture(model, seed=99), check_trace=False)
        x = small.picture(model, seed=11)
        oracle.assert_close(traced(x), model(x))
        assert torch.equal(torch.stack(run.kept), kept)
        assert model(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("called", [False, True])
@torch.no_grad()
def test_a_mean_behind_compiled_layers_is_refused(called: bool) -> None:
    torch._dynamo.reset()
    model = hf.build("Dinov2ForImageClassification")
    x, other = (hf.inputs("Dinov2ForImageClassification", seed=seed) for seed in (0, 1))
    with visprune.prune(model, "tome", r=4):
        want = model(**x).logits if called else None
        whole = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            first = whole(**x).logits
            assert want is None or torch.equal(first, want)
            assert not torch.equal(whole(**other).logits, first)
        model.dinov2 = torch.compile(model.dinov2, backend="aot_eager")

        def twice() -> None:  # the first may use up what the last call outside of it left
            model(**x)
            model(**x)

        with pytest.raises(UnsupportedModel, match=r"compiled by itself.*Compile the whole model"):
            twice()
    with visprune.prune(model, "evit", keep_ratio=0.6) as run:  # whose tokens count once
        got = model(**x).logits
    model.dinov2 = model.dinov2._orig_mod
    with visprune.prune(model, "evit", keep_ratio=0.6):
        oracle.assert_close(got, model(**x).logits)
    assert "removed" in repr(run)
