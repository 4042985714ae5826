# SPDX-License-Identifier: Apache-2.0
"""Send a cache to another device: what it stores, and what it knows of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from visprune.backbones.hf.cache import Ledger
from visprune.backbones.hf.ragged import Sealed, Segments
from visprune.errors import ConfigError

# What holds tensors inside of a cache. Runs are no part of it: a copy belongs to the same one.
_HOLDERS = (Cache, CacheLayerMixin, Ledger, Segments, Sealed)


def cache_to(cache: Any, device: str | torch.device) -> Any:
    """A copy of a cache on another device, with all that a pruned one knows of its slots.

    Keys, values, codes, biases, offsets and ledgers move together; the run that wrote the cache
    goes on with it (its model has to be on that device, too). The cache that is given stays as it
    is. What a cache holds is the whole of it: a prompt that was read on a large device can be asked
    on a small one, or wait in main memory (``"cpu"``) until the next question.

    Args:
        cache: a cache of transformers, pruned or not.
        device: where to.

    Raises:
        ConfigError: it is no cache.
    """
    if not isinstance(cache, Cache):
        raise ConfigError(
            f"cache_to sends a cache of transformers to a device, such as model(..., "
            f"use_cache=True).past_key_values; got {type(cache).__name__}."
        )
    return _moved(cache, torch.device(device), {})


def _moved(x: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    """Whatever a holder has: what layers share they share again."""
    if id(x) in memo:
        return memo[id(x)]
    made: Any = x
    if isinstance(x, Tensor):
        made = x.to(device)
    elif isinstance(x, torch.device):
        made = device
    elif isinstance(x, _HOLDERS) or hasattr(x, "__dataclass_fields__"):
        memo[id(x)] = made = object.__new__(type(x))
        vars(made).update((name, _moved(value, device, memo)) for name, value in vars(x).items())
    elif isinstance(x, dict):
        made = {key: _moved(value, device, memo) for key, value in x.items()}
    elif isinstance(x, tuple) and hasattr(x, "_fields"):
        made = type(x)(*(_moved(value, device, memo) for value in x))
    elif isinstance(x, list | tuple):
        made = type(x)(_moved(value, device, memo) for value in x)
    memo[id(x)] = made
    return made
