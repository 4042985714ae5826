# SPDX-License-Identifier: Apache-2.0
"""The untouched model whose new tokens do not see what each head has dropped of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.contract.cases import CACHE, FAMILIES, LINE_FAMILIES
from visprune.core.trace import Trace

# What asks for positions along a line.
LINES = ("expected_attention",)
PAIRS = [(n, f) for n in CACHE for f in FAMILIES if n not in LINES or f in LINE_FAMILIES]


def everything(name: str) -> dict[str, Any]:
    """Parameters under which nothing is lost."""
    return EVERYTHING.get(name, {"keep_ratio": 1.0})


def few(name: str) -> dict[str, Any]:
    """Parameters under which heads keep a few visual tokens of each picture."""
    return FEW.get(name, {"num_keep": 5})


EVERYTHING: dict[str, dict[str, Any]] = {}
FEW: dict[str, dict[str, Any]] = {}


def seen_by_heads(trace: Trace, valid: Tensor, total: int, heads: int) -> list[Tensor]:
    """Of every layer, which keys each query head may see, ``[B, H, S, S]`` bool.

    Args:
        trace: of the prompt.
        valid: which of its tokens hold no padding, ``[B, L]``.
        total: S, the prompt and what follows.
        heads: H.
    """
    assert trace.cache is not None
    batch, length = valid.shape
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    real = torch.nn.functional.pad(valid, (0, total - length), value=True)
    found = []
    for layer in range(len(trace.cache.form)):
        there = torch.zeros(batch, heads, total, dtype=torch.bool)
        there[:, :, length:] = True
        for row in range(batch):
            kept = trace.cache.kept[row][layer]
            group = heads // len(kept) if len(kept) > 1 else heads
            for head, index in enumerate(kept):
                there[row, head * group : (head + 1) * group, index] = True
        new = (torch.arange(total) >= length)[:, None]
        seen = causal & real[:, None, None] & (there[:, :, None] | ~new)
        found.append(seen | torch.eye(total, dtype=torch.bool))
    return found


@contextmanager
def hiding(model: Any, seen: list[Tensor]) -> Iterator[None]:
    """Run ``model`` with each layer's own mask."""

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        least = torch.finfo(torch.float32).min
        mask = torch.zeros(seen[number].shape).masked_fill(~seen[number], least)
        return args, {**kwargs, "attention_mask": mask}

    with ExitStack() as stack:
        for number, layer in enumerate(model.model.language_model.layers):
            handle = layer.register_forward_pre_hook(partial(before, number), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def hidden_logits(model: Any, longer: dict[str, Any], trace: Trace, length: int) -> Tensor:
    """Logits ``[B, S, V]`` of the untouched model on prompt and answer at once, no cache."""
    total = longer["input_ids"].shape[1]
    valid = longer["attention_mask"][:, :length].bool()
    heads = model.config.text_config.num_attention_heads
    seen = seen_by_heads(trace, valid, total, heads)
    with hiding(model, seen), torch.no_grad():
        return model(**longer, use_cache=False).logits
