# SPDX-License-Identifier: Apache-2.0
"""The untouched model whose new tokens do not see what each head has dropped of the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.contract.cases import CACHE, FAMILIES, LATER_FAMILIES, LINE_FAMILIES
from visprune.backbones.hf.cache import CACHE_ARGUMENT
from visprune.backbones.hf.ragged import RaggedLayer
from visprune.backbones.hf.sealed import Codes, Thin
from visprune.core.cache import HeadSlots
from visprune.core.trace import Trace

# What asks for positions along a line.
LINES = ("expected_attention",)
# One of each way to store runs on every family, the others on one of each kind.
FIRST = ("snapkv", "adakv")
PAIRS = [
    (n, f)
    for n in CACHE
    for f in FAMILIES
    if (n in FIRST or f in LATER_FAMILIES) and (n not in LINES or f in LINE_FAMILIES)
]
MERGING = ("look_m", "d2o", "kvmerger", "razor_attention")
STORED = ("zipcache", "kvquant", "think", "actqkv", "tokenselect")  # in other ways than plain
DROPPING = [pair for pair in PAIRS if pair[0] not in (*MERGING, *STORED)]
# Codes are rounded, and what is read in parts is added in parts.
LOSSLESS = [pair for pair in PAIRS if pair[0] not in STORED or pair[0] == "think"]


def everything(name: str) -> dict[str, Any]:
    """Parameters under which nothing is lost."""
    return EVERYTHING.get(name, {"keep_ratio": 1.0})


def few(name: str) -> dict[str, Any]:
    """Parameters under which heads keep a few visual tokens of each picture."""
    return FEW.get(name, {"num_keep": 5})


EVERYTHING: dict[str, dict[str, Any]] = {
    "zipvl": {"tau": 1.0},
    "think": {"ratio": 0.0},
}
FEW: dict[str, dict[str, Any]] = {
    "streaming_llm": {"num_keep": 5, "positions": "original"},  # else: test_cache_positions.py
    "zipvl": {"tau": 0.3, "probe": 0.2},
    "zipcache": {"bits": 4, "low_bits": 2},
    "kvquant": {"bits": 4, "num_keep": 9},
    "think": {"ratio": 0.4, "num_keep": 9},
    "actqkv": {"block": 4, "top": 2},
    "tokenselect": {"top": 5},
}


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


def contents(entry: Any) -> list[HeadSlots]:
    """What the heads of a layer hold of one sample, as numbers; channels that are gone are zero."""
    if not isinstance(entry, RaggedLayer):
        whole = torch.arange(entry.keys.shape[2])
        return [HeadSlots(k, v, whole) for k, v in zip(entry.keys[0], entry.values[0], strict=True)]
    found, plain = [], entry.segments
    for head, (start, count) in enumerate(
        zip(plain.offsets.tolist(), plain.lengths.tolist(), strict=False)
    ):
        span = slice(start, start + count)
        keys, values = [plain.keys[span]], [plain.values[span]]
        for part in entry.sealed:
            key, value = _numbers(part, head, keys[0].shape[1])
            keys.append(key)
            values.append(value)
        joined = torch.cat(keys)
        found.append(HeadSlots(joined, torch.cat(values), torch.arange(len(joined))))
    return found


def _numbers(part: Any, head: int, width: int) -> tuple[Tensor, Tensor]:
    if isinstance(part, Codes):
        return part.numbers()[head]
    if isinstance(part, Thin):
        start, count = int(part.offsets[head]), int(part.lengths[head])
        key = torch.zeros(count, width)
        key[:, part.channels[head]] = part.keys[start : start + count]
        return key, part.values[start : start + count]
    count = int(part.lengths[0])
    return part.keys[0, head].flatten(0, 1)[:count], part.values[0, head].flatten(0, 1)[:count]


def stored_logits(model: Any, heads: list[Any], after: dict[str, Any], length: int) -> Tensor:
    """Logits of the untouched model on ``after``, whose cache holds what is given.

    Args:
        model: the model.
        heads: of every layer, the :class:`HeadSlots` of its key heads.
        after: what it takes for text behind a prompt of one sample.
        length: tokens of that prompt.
    """
    config, cache, masks = model.config.text_config, DynamicCache(), []
    width = max(len(head.key) for layer in heads for head in layer)
    new = after["input_ids"].shape[1]
    for number, layer in enumerate(heads):
        keys = torch.zeros(1, len(layer), width, layer[0].key.shape[1])
        values, mask = torch.zeros_like(keys), torch.full((len(layer), width), -torch.inf)
        for head, slots in enumerate(layer):
            count = len(slots.key)
            keys[0, head, :count], values[0, head, :count] = slots.key, slots.value
            mask[head, :count] = 0.0 if slots.bias is None else slots.bias
        cache.update(keys, values, number)
        group = config.num_attention_heads // len(layer)
        old = mask.repeat_interleave(group, 0)[:, None].expand(-1, new, -1)
        causal = torch.full((new, new), -torch.inf).triu(1)
        masks.append(torch.cat([old, causal.expand(len(old), -1, -1)], -1)[None])

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": masks[number]}

    ids = after.get("position_ids")
    if ids is None:
        ids = torch.arange(length, length + new)[None]
    with ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(model.model.language_model.layers):
            handle = layer.register_forward_pre_hook(partial(before, number), with_kwargs=True)
            stack.callback(handle.remove)
        return model(
            input_ids=after["input_ids"], position_ids=ids, **{CACHE_ARGUMENT: cache}
        ).logits


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
