# SPDX-License-Identifier: Apache-2.0
"""Features of pictures in the form in which transformers passes them on.

What ``get_image_features`` returns holds one tensor per entry: a picture, a tile of one, or all
pictures of a sample. It is a list, or where all have one shape, one tensor. ``generate`` encodes
before the first forward, repeats the entries for beams, and passes on nothing else; so what is
known of each entry goes along with it, as a mark. A copy (another device, a clone) has lost
its mark and is known by its values, as long as the features that it was made of are there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

_MARK = "_visprune_pieces"
# Features that carry a mark, by their id; tensors have no equality that a set of them could use.
_MARKED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def encoder_output(features: list[Tensor]) -> Any:
    """What ``get_image_features`` returns, made of features that were encoded earlier."""
    return BaseModelOutputWithPooling(pooler_output=features)


def entries(output: Any) -> Tensor | Sequence[Tensor]:
    """The features of an encoder's output, one entry after the other.

    Families without a projector's output have them as the encoder's own, or as those that are
    added before decoder layers, ``(layer, entries)`` of each.
    """
    found = getattr(output, "pooler_output", None)
    layers = getattr(output, "deepstack_features", None)
    if found is None and layers:
        return layers[0][1]
    if found is None:
        found = getattr(output, "last_hidden_state", None)
    return output if found is None else found


def together(output: Any) -> bool:
    """Whether the tokens of all entries stand in one line, ``[N, D]`` (older transformers)."""
    found = entries(output)
    return isinstance(found, Tensor) and found.dim() == 2


def lengths(output: Any) -> list[int]:
    """Tokens of each entry; those of all, where they stand in one line."""
    found = entries(output)
    if isinstance(found, Tensor) and found.dim() == 2:
        return [len(found)]
    return [entry.shape[:-1].numel() for entry in found]


def mark(output: Any, known: Sequence[Any]) -> None:
    """Note what is known of each entry; it goes along where the entries are repeated."""
    found = entries(output)
    if isinstance(found, Tensor):
        for holder in (output, found):
            _set(holder, (found.shape[0], list(known)))
        _MARKED[id(found)] = found
        return
    for entry, one in zip(found, known, strict=True):
        _set(entry, one)
        _MARKED[id(entry)] = entry


def marks(output: Any) -> list[Any] | None:
    """What was noted of each entry, or ``None`` where that was lost."""
    found = entries(output)
    if isinstance(found, Tensor):
        count, known = getattr(output, _MARK, None) or _recalled(found) or (None, None)
        return known if count == found.shape[0] else None
    each = [getattr(entry, _MARK, None) or _recalled(entry) for entry in found]
    return None if any(one is None for one in each) else each


def _recalled(copy: Tensor) -> Any:
    """The mark of the features that a tensor is a copy of, or ``None``."""
    values = copy.detach()
    for original in list(_MARKED.values()):
        alike = original.shape == values.shape and original.dtype == values.dtype
        if alike and torch.equal(original.detach().to(values.device), values):
            return getattr(original, _MARK)
    return None


def _set(holder: Any, known: Any) -> None:
    object.__setattr__(holder, _MARK, known)


@contextmanager
def unstacked(outputs: Mapping[str, Any]) -> Iterator[None]:
    """Let what repeats entries meet lists of them, so that each repeated one keeps its mark.

    Args:
        outputs: encoder outputs by kind; those whose entries are one tensor have one afterwards.
    """
    stacked = []
    for output in outputs.values():
        found = getattr(output, "pooler_output", None)
        known = None if not isinstance(found, Tensor) else marks(output)
        if known is not None and isinstance(found, Tensor):
            output.pooler_output = list(found)
            mark(output, known)
            stacked.append(output)
    try:
        yield
    finally:
        for output in stacked:
            known = marks(output)
            output.pooler_output = torch.stack(list(output.pooler_output))
            if known is not None:
                mark(output, known)
