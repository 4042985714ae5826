# SPDX-License-Identifier: Apache-2.0
"""The untouched model of any family with tokens hidden as keys, on masks of its own making."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visprune.machine.find import find_adapter

Inputs = dict[str, Any]


@contextmanager
def hiding(model: Any, keep: list[Tensor]) -> Iterator[None]:
    """Run ``model`` (eager: its masks are whole) without the keys that ``keep`` lacks, by layer."""

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        assert mask.dim() == 4, "eager attention has its mask written out"
        gone = ~keep[number][:, None, None, :]
        alone = torch.eye(mask.shape[-1], dtype=torch.bool)  # a hidden token sees itself
        fill = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(gone & ~alone, fill)}

    with ExitStack() as stack:
        for number, layer in enumerate(find_adapter(model).layers):
            hook = partial(before, number)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def hidden_logits(model: Any, inputs: Inputs, keep: list[Tensor]) -> Tensor:
    """Logits ``[B, S, V]`` of the untouched model with hidden keys (no cache)."""
    with hiding(model, keep), torch.no_grad():
        return model(**inputs, use_cache=False).logits


def extended(inputs: Inputs, tokens: Tensor) -> Inputs:
    """The inputs with text ``tokens`` ``[B, T]`` appended."""
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    for name in inputs:
        if name == "attention_mask" or name.endswith("token_type_ids"):
            more = torch.full_like(tokens, int(name == "attention_mask"))
            out[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], 1)
    return out


def decoder_call(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the untouched decoder is called with."""
    seen: dict[str, Any] = {}
    decoder = find_adapter(model).language_model
    handle = decoder.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen
