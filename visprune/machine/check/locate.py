# SPDX-License-Identifier: Apache-2.0
"""Where a pruned model first leaves the untouched one whose tokens are hidden: name the culprit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.base import VLMAdapter
from visprune.core.method import PruningMethod
from visprune.core.slots import SlotTable
from visprune.machine.check.attach import attached
from visprune.machine.check.hide import before_layers, hiding
from visprune.machine.check.prompts import Inputs
from visprune.machine.check.report import difference


@dataclass
class Given:
    """What one decoder layer is given.

    Attributes:
        hidden: states that enter it.
        mask: its attention mask.
        rotary: its rotary embedding.
        rest: other tensors, by name.
    """

    hidden: Tensor
    mask: Any
    rotary: Any
    rest: dict[str, Tensor]


_KNOWN = ("hidden_states", "attention_mask", "position_embeddings", "position_ids")


@contextmanager
def given(layers: Any) -> Iterator[dict[int, Given]]:
    """Note what layers are given, by number."""
    found: dict[int, Given] = {}

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k not in _KNOWN}
        found[number] = Given(
            hidden, kwargs.get("attention_mask"), kwargs.get("position_embeddings"), rest
        )

    with before_layers(layers, before):
        yield found


def first_difference(
    adapter: VLMAdapter,
    inputs: Inputs,
    method: PruningMethod,
    keep: list[Tensor],
    allowed: float,
) -> str:
    """Name what the first layer that goes wrong is given wrongly.

    Args:
        adapter: the model family.
        inputs: the prompt.
        method: what drops tokens.
        keep: tokens that each layer sees, ``[B, S]`` bool.
        allowed: largest difference that rounding makes.
    """
    layers = adapter.layers
    with hiding(layers, keep), given(layers) as wanted:
        adapter.model(**inputs, use_cache=False)
    with attached(adapter, method) as found, given(layers) as got:
        adapter.model(**inputs, use_cache=False)
    entered = found.forwards[-1].entered
    for number in range(len(layers)):
        one, other, table = got[number], wanted[number], entered[number].table
        if _far(one.hidden, other.hidden, table, allowed):
            return _of_states(number)
        if _far_rotary(one.rotary, other.rotary, table):
            return f"The positions that decoder layer {number} is given are not its tokens'."
        if _other_mask(one.mask, other.mask, table):
            return f"The mask of decoder layer {number} shows other tokens than the untouched one."
        for name, value in one.rest.items():
            if name in other.rest and _far(value, other.rest[name], table, allowed):
                return f"Decoder layer {number} is given {name} of other tokens."
    return "Every layer is given what it should; the output is not."


def _of_states(number: int) -> str:
    if number == 0:
        return "The states that enter the decoder are not those of the tokens that stay."
    return (
        f"Decoder layer {number - 1} was given the right states, positions and mask; what leaves "
        f"it, with what is added behind it, is not what it should be: something else that the "
        f"family indexes by token."
    )


def _gathered(whole: Tensor, table: SlotTable) -> Tensor | None:
    """``[..., B or 1, S, d]`` at the tokens of the slots, ``None``: it is no such thing."""
    if whole.dim() < 3 or whole.shape[-2] != table.length:
        return None
    batch = table.index.shape[0]
    whole = whole.expand(*whole.shape[:-3], batch, -1, -1)
    index = table.index.to(whole.device)[..., None].expand(*whole.shape[:-2], -1, whole.shape[-1])
    return whole.gather(-2, index)


def _far(got: Tensor, whole: Tensor, table: SlotTable, allowed: float) -> bool:
    want = _gathered(whole, table)
    if want is None or got.dim() < 3 or got.shape[-2] != want.shape[-2]:
        return want is not None
    got, there = got.expand_as(want), (table.valid & table.real).to(got.device)
    return difference(got[..., there, :], want[..., there, :]) > allowed


def _far_rotary(got: Any, whole: Any, table: SlotTable) -> bool:
    pairs = [(got, whole)] if isinstance(got, Tensor) else list(zip(got or (), whole or ()))  # noqa: B905
    return any(
        _far(a, b, table, 1e-3)
        for a, b in pairs
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not a.is_complex()
    )


def _visible(mask: Any, slots: int, device: torch.device) -> Tensor | None:
    """Which keys each query sees, ``[B or 1, Q, K]`` bool; ``None``: it cannot be told."""
    if mask is None:
        return torch.ones(1, slots, slots, dtype=torch.bool, device=device).tril()
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    mask = mask[:, 0, :, :slots]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _other_mask(got: Any, whole: Any, table: SlotTable) -> bool:
    own = _visible(got, table.num_slots, table.index.device)
    want = _visible(whole, table.length, table.index.device)
    if own is None or want is None:
        return False
    batch, slots = table.index.shape
    want, own = want.expand(batch, -1, -1), own.expand(batch, -1, -1).to(want.device)
    index, there = table.index.to(want.device), (table.valid & table.real).to(want.device)
    want = want.gather(1, index[..., None].expand(-1, -1, table.length))
    want = want.gather(2, index[:, None].expand(-1, slots, -1))
    both = there[..., None] & there[:, None]
    return bool((own != want)[both].any())
