# SPDX-License-Identifier: Apache-2.0
"""Threads that call one pruned model get what they get one after the other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests import tiny
from tests.contract.cases import batch, few
from tests.encoders import small

WORKERS, CALLS = 2, 8


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Switch threads far more often than by default: between any two hooks."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def agree(call: Callable[[int], list[Tensor]]) -> None:
    want = [call(number) for number in range(CALLS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(2):
            got = list(pool.map(call, range(CALLS)))
            for mine, wanted in zip(got, want, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "name", ["divprune", "visionzip", "fastv", "pyramiddrop", "todre", "adakv"]
)
def test_prompts_of_one_shape(name: str, family: str, models: Any) -> None:
    if (name, family) == ("visionzip", "qwen2_5_vl"):
        return  # refused there
    model = models(family)
    prompts = [batch(family, [[2, "a", 4 + n % 2]]) for n in range(CALLS)]
    for number, prompt in enumerate(prompts):
        torch.manual_seed(number)
        prompt["pixel_values"] = torch.randn_like(prompt["pixel_values"])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with visprune.prune(model, name, **few(name)) as run:

        @torch.no_grad()
        def call(number: int) -> list[Tensor]:
            ids = model.generate(**prompts[number], **options)
            kept = run.trace.kept[0]
            return [ids, kept, model(**prompts[number]).logits]

        agree(call)


@pytest.mark.parametrize(
    ("method", "params"),
    [("tome", {"r": 4}), ("evit", {"keep_ratio": 0.7}), ("random", {"num_keep": 6})],
)
def test_pictures_of_one_size(method: str, params: dict[str, Any]) -> None:
    model = small.shrunk(small.KINDS["plain"])
    torch.manual_seed(0)
    pictures = [torch.randn_like(small.picture(model)) for _ in range(CALLS)]
    with visprune.prune(model, method, **params) as run:

        @torch.no_grad()
        def call(number: int) -> list[Tensor]:
            return [model(pictures[number]), *run.trace.kept]

        agree(call)


@pytest.mark.parametrize("kind", ["plain", "eva_rope", "two_in_parallel"])
def test_a_thread_that_comes_between_a_query_and_its_key(kind: str) -> None:
    model = small.shrunk(small.KINDS[kind])
    pictures = [small.picture(model, seed=seed) for seed in range(2)]
    norms = [part for name, part in model.named_modules() if name.endswith("q_norm")]
    assert norms
    both = threading.Barrier(2, timeout=10)

    def meet(*given: Any) -> None:
        """Both threads have their queries before either has its keys."""
        both.wait()

    call = torch.no_grad()(model.forward)  # its state is a thread's own
    with visprune.prune(model, "evit", keep_ratio=0.7):
        want = [call(picture) for picture in pictures]
        handles = [norm.register_forward_hook(meet) for norm in norms]
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(call, pictures))
        for handle in handles:
            handle.remove()
    for mine, wanted in zip(got, want, strict=True):
        assert torch.equal(mine, wanted)


def test_the_trace_is_that_of_ones_own_thread(models: Any) -> None:
    model = models("llava")
    with visprune.prune(model, "uniform", num_keep=5) as run, torch.no_grad():
        model(**batch("llava", [[2, "a", 4]]))
        assert len(run.trace.kept) == 1
        other = threading.Thread(target=lambda: model(**batch("llava", [[2, "a", 4]] * 3)))
        other.start()
        other.join()
        assert len(run.trace.kept) == 1
        seen: list[int] = []
        looks = threading.Thread(target=lambda: seen.append(len(run.trace.kept)))
        looks.start()
        looks.join()
        assert seen == [3]  # a thread that ran nothing sees the last of any


def test_removal_waits_for_a_call_of_another_thread(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[2, "a", 4]])
    want = model(**inputs).logits
    run = visprune.prune(model, "fastv", num_keep=5, layer=2)
    pruned = model(**inputs).logits
    inside, go_on = threading.Event(), threading.Event()

    def pause(module: Any, args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)

    handle = model.model.language_model.layers[1].register_forward_pre_hook(pause)
    found: list[Tensor] = []
    caller = threading.Thread(target=lambda: found.append(model(**inputs).logits))
    caller.start()
    assert inside.wait(60)
    remover = threading.Thread(target=run.remove)
    remover.start()
    remover.join(0.3)
    assert remover.is_alive()  # it waits
    go_on.set()
    caller.join()
    remover.join()
    handle.remove()
    assert torch.equal(found[0], pruned)
    assert torch.equal(model(**inputs).logits, want)


def test_a_tiny_model_of_each_family_is_what_it_was(models: Any) -> None:
    for family in tiny.FAMILIES:
        assert visprune.runs(models(family)) == []
