# SPDX-License-Identifier: Apache-2.0
"""The untouched model of any family with tokens hidden as keys, on masks of its own making.

Where layers carry a state from token to token there is no key to hide. There the decoder is given
the shorter sequence itself, with the positions that its tokens had: they were never there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.contract.oracle import error
from tests.families.claimed import recurrent
from visprune.machine.check import absent
from visprune.machine.check.hide import hiding
from visprune.machine.check.prompts import extended
from visprune.machine.find import find_adapter

__all__ = [
    "absent_logits", "decoder_call", "extended", "gone_logits", "hidden_logits", "last_states",
    "masks_of",
    "two_kernels",
]  # fmt: skip

Inputs = dict[str, Any]


def hidden_logits(model: Any, inputs: Inputs, keep: list[Tensor]) -> Tensor:
    """Logits ``[B, S, V]`` of the untouched model with hidden keys (no cache)."""
    with hiding(find_adapter(model).layers, keep), torch.no_grad():
        return model(**inputs, use_cache=False).logits


def decoder_call(model: Any, inputs: Inputs) -> Inputs:
    """The arguments that the untouched decoder is called with."""
    return absent.decoder_call(find_adapter(model), inputs)[0]


def last_states(model: Any, inputs: Inputs) -> Tensor:
    """What the decoder gives back, ``[B, S, D]``."""
    found: list[Tensor] = []
    decoder = find_adapter(model).language_model
    handle = decoder.register_forward_hook(lambda m, a, out: found.append(out.last_hidden_state))
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def masks_of(model: Any, inputs: Inputs) -> list[Tensor | None]:
    """The mask of every layer of the untouched model (eager); recurrent layers have none."""
    return absent.decoder_call(find_adapter(model), inputs)[1]


def absent_logits(model: Any, inputs: Inputs, keep: list[Tensor]) -> Tensor:
    """Logits ``[B, S, V]`` of the untouched decoder on the tokens that ``keep`` has, row by row."""
    return absent.absent_logits(find_adapter(model), inputs, keep)


def gone_logits(family: str, model: Any, inputs: Inputs, keep: list[Tensor]) -> Tensor:
    """What a family must agree with: hidden keys, or where layers carry a state, their absence."""
    oracle = absent_logits if recurrent(family) else hidden_logits
    return oracle(model, inputs, keep)


def two_kernels(family: str, eager: Any, inputs: dict[str, Any], plain: Any) -> float:
    """How far what is compared with lies from the untouched model where nothing was dropped.

    Its attention is another kernel, and recurrent layers sum up in other pieces row by row.
    """
    valid = inputs["attention_mask"].bool()
    everything = [valid] * len(find_adapter(eager).layers)
    return error(plain[valid], gone_logits(family, eager, inputs, everything)[valid])
