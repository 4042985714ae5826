# SPDX-License-Identifier: Apache-2.0
"""Time per token over an evicted cache, beside one that had only those slots from the start."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache

from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.catalog import get_method
from visprune.core.cache import CacheTrace
from visprune.errors import ConfigError
from visprune.eval.speed.ideal import prompt
from visprune.eval.speed.latency import Case, Timings, interleaved
from visprune.machine.run import Run, prune

__all__ = ["measure"]


@dataclass
class _Decoding:
    """A cache that grows by a few tokens and is cropped again, over and over.

    Attributes:
        model: whose.
        cache: behind a prompt.
        seen: tokens of the prompt, which positions count from.
        tokens: what is fed, ``[B, T]``.
    """

    model: Any
    cache: Any
    seen: int
    tokens: Tensor

    def __call__(self, turn: int = 0) -> list[Tensor]:
        """The logits of every token."""
        logits = []
        for step in range(self.tokens.shape[1]):
            place = torch.tensor([[self.seen + step]], device=self.tokens.device)
            out = self.model(
                input_ids=self.tokens[:, step : step + 1], position_ids=place, use_cache=True,
                **{CACHE_ARGUMENT: self.cache},
            )  # fmt: skip
            logits.append(out.logits[:, -1])
        return logits

    @contextmanager
    def around(self) -> Iterator[None]:
        """Take back what a run has written."""
        yield
        self.cache.crop(-self.tokens.shape[1])


def measure(
    model: Any, shape: str, names: Sequence[str], budgets: Sequence[int], *, new_tokens: int,
    rounds: int, batch: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time the tokens behind a prompt under every method at every budget, dense and ideal beside.

    The ideal is the untouched model over a plain cache of as many slots in every head, the mean of
    the layer's, of random numbers. Every case has a model of its own; all share their weights.

    Args:
        model: of :func:`visprune.eval.speed.ideal.build`.
        shape: its shape.
        names: methods that act at the cache.
        budgets: visual tokens that heads keep, on average.
        new_tokens: that are fed one by one in a round.
        rounds: of every case.
        batch: rows of the prompt.

    Returns:
        One row per method and budget, as those of ``bench decode``.

    Raises:
        ConfigError: what a head keeps is not what its trace tells.
    """
    inputs = prompt(model, shape, batch)
    seen = inputs["input_ids"].shape[1]
    tokens = inputs["input_ids"][:, :1].expand(-1, new_tokens).contiguous()
    dense = _Decoding(model, _filled(model, inputs), seen, tokens)
    cases, keys = [Case("dense", dense, dense.around)], []
    with ExitStack() as stack, torch.inference_mode():
        for num_keep in budgets:
            for name in names:
                other = _sharing(model)
                run = stack.enter_context(prune(other, get_method(name, num_keep=num_keep)))
                ours = _Decoding(other, _filled(other, inputs), seen, tokens)
                trace = _trace(run)
                ideal = _Decoding(model, _plain(ours.cache, trace, batch), seen, tokens)
                cases.append(Case(f"ideal {name} {num_keep}", ideal, ideal.around))
                cases.append(Case(f"{name} {num_keep}", ours, ours.around))
                keys.append((name, num_keep, trace))
        with Progress(transient=True) as bars:
            bar = bars.add_task("taking turns", total=len(cases) * rounds)
            timings = interleaved(
                cases, rounds=rounds, warmup=2, device=model.device,
                after=lambda *_: bars.advance(bar),
            )  # fmt: skip
    return [_row(name, keep, trace, timings, new_tokens) for name, keep, trace in keys]


def _trace(run: Run) -> CacheTrace:
    trace = run.trace.cache
    if trace is None:
        raise ConfigError(f"{run.method.name} left the cache as it was; there is nothing to time.")
    return trace


def _sharing(model: Any) -> Any:
    """A copy of a model with the same weights, for hooks of its own."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(x): x for x in tensors})


def _filled(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The cache behind a prompt."""
    with torch.inference_mode():
        return cache_of(model(**inputs, use_cache=True, logits_to_keep=1))


def _plain(like: Any, trace: CacheTrace, batch: int) -> DynamicCache:
    """A plain cache with as many slots in every head as another has on average."""
    cache = DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for layer, entry in enumerate(like.layers):
        heads = trace.slots[0][layer]
        slots = round(sum(heads) / len(heads))
        shape = (2, batch, len(heads), slots, entry.keys.shape[-1])
        keys, values = torch.randn(shape, generator=generator).to(entry.keys)
        cache.update(keys, values, layer)
    return cache


def _row(
    name: str, num_keep: int, trace: CacheTrace, timings: Timings, new_tokens: int
) -> dict[str, Any]:
    ours, ideal, dense = (
        [seconds / new_tokens for seconds in timings.seconds[key]]
        for key in (f"{name} {num_keep}", f"ideal {name} {num_keep}", "dense")
    )
    forms = sorted(set(trace.form))
    return {
        "method": f"{name} ({', '.join(forms)})",
        "num_keep": num_keep,
        "new_tokens": new_tokens,
        "dense_ms_per_token": 1e3 * median(dense),
        "method_ms_per_token": 1e3 * median(ours),
        "ideal_ms_per_token": 1e3 * median(ideal),
        "speedup": median(a / b for a, b in zip(dense, ours, strict=True)),
        "ideal_speedup": median(a / b for a, b in zip(dense, ideal, strict=True)),
        "share": median(a / b for a, b in zip(ideal, ours, strict=True)),
    }
