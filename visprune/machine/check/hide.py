# SPDX-License-Identifier: Apache-2.0
"""The untouched model with tokens hidden as keys: what every pruned model must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visprune.errors import UnsupportedKernel


def lowest(dtype: torch.dtype) -> Any:
    """What hides a key in a mask of a dtype."""
    return False if dtype == torch.bool else torch.finfo(dtype).min


def without(mask: Any, keep: Tensor, hidden: Tensor) -> Tensor:
    """A layer's mask without some keys; a hidden token still sees itself.

    Args:
        mask: what the layer is given: 4-D, or ``None`` (causal).
        keep: tokens that are there, ``[B, S]`` bool.
        hidden: the states that enter the layer, ``[B, S, D]`` at the end of their shape.

    Raises:
        UnsupportedKernel: the layer is given a mask of another kind.
    """
    length = keep.shape[1]
    keep = keep.to(hidden.device)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        mask = mask.expand(keep.shape[0], 1, -1, -1)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise UnsupportedKernel(
            "The attention kernel of this model takes no 4-D mask, so no token can be hidden from "
            "it; load it with attn_implementation='sdpa' to compare dropping with hiding."
        )
    mask = mask[..., :length]
    alone = torch.eye(length, dtype=torch.bool, device=mask.device)
    gone = ~keep[:, None, None, :] & ~alone
    return mask.masked_fill(gone, lowest(mask.dtype))


@contextmanager
def hiding(layers: Sequence[Any], keep: Sequence[Tensor]) -> Iterator[None]:
    """Let decoder layers run without the keys that ``keep`` lacks, layer by layer.

    Args:
        layers: of an untouched decoder, which is called without a cache.
        keep: tokens that each layer sees, ``[B, S]`` bool.
    """

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = without(kwargs.get("attention_mask"), keep[number], hidden)
        return args, {**kwargs, "attention_mask": mask}

    with before_layers(layers, before):
        yield


@contextmanager
def before_layers(
    layers: Sequence[Any], hook: Callable[[int, Any, Any, dict[str, Any]], Any]
) -> Iterator[None]:
    """Call ``hook(number, layer, args, kwargs)`` before each layer, after hooks that are there."""
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(partial(hook, number), with_kwargs=True)
            stack.callback(handle.remove)
        yield
