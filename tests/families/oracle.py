# SPDX-License-Identifier: Apache-2.0
"""The untouched model of any family with tokens hidden as keys, on masks of its own making."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visprune.machine.check.hide import hiding
from visprune.machine.check.prompts import extended
from visprune.machine.find import find_adapter

__all__ = ["decoder_call", "extended", "hidden_logits"]

Inputs = dict[str, Any]


def hidden_logits(model: Any, inputs: Inputs, keep: list[Tensor]) -> Tensor:
    """Logits ``[B, S, V]`` of the untouched model with hidden keys (no cache)."""
    with hiding(find_adapter(model).layers, keep), torch.no_grad():
        return model(**inputs, use_cache=False).logits


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
