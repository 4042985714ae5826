# SPDX-License-Identifier: Apache-2.0
"""A cache layer that knows how many tokens it has seen apart from how many it stores."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.masking_utils import create_causal_mask

from visprune.core.slots import SlotTable
from visprune.errors import ConfigError, UnsupportedModel

# transformers 5.24 calls it ``cache`` everywhere; before, and until 5.40 as an alias, it is
# ``past_key_values``.
CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)


def cache_of(found: Any) -> Any:
    """The cache among the arguments of a call, or in a model's output, under either name."""
    cache = found.get("cache")
    return found.get("past_key_values") if cache is None else cache


def new_cache(config: Any) -> dict[str, Any]:
    """The argument that gives a call of a decoder an empty cache."""
    return {CACHE_ARGUMENT: DynamicCache(config=config)}


# Layers that keep no keys: a state, or nothing at all (older transformers have no such layers).
STATES: tuple[type, ...] = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionLayer", "DummyLayer")
    if hasattr(cache_utils, name)
)

# Runs by key, for caches that were pickled; one that is gone is in force no more.
_OWNERS: WeakValueDictionary[str, Owner] = WeakValueDictionary()


class Owner:
    """The run that wrote a cache; its layers can be read only while it is in force.

    A copy of a run is another owner; a copy of a cache still belongs to the run that wrote it.

    Args:
        name: of the method.
        active: whether the run is in force.
    """

    def __init__(self, name: str, active: bool = True) -> None:
        self.name, self.active = name, active
        self.key = uuid.uuid4().hex
        _OWNERS[self.key] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return Owner(self.name, self.active)

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, (self.name, self.active)


def _owner(key: str, name: str) -> Owner:
    """The owner of a pickled cache; of a run that is gone, one that is not in force."""
    found = _OWNERS.get(key)
    return Owner(name, active=False) if found is None else found


class Ledger:
    """What the slots of a cache hold; one object shared by all layers with the same history.

    Attributes:
        owner: the run that wrote the slots.
        seen: logical length: tokens that the model was fed; positions count from here.
        index: logical position of each slot, ``[B, P]``.
        valid: whether the slot may be attended to, ``[B, P]``.
        padded: whether any slot is not valid.
        shift: tokens dropped so far in each row, ``[B]`` (what compact positions close up).
        evicted: after an eviction: which of the tokens up to then were there, ``[B, n]``; ``index``
            is -1 for slots that are not the same tokens in all heads.
        bias: what attention adds to the scores of each slot, ``[B, P]``; ``None``: nothing.
    """

    def __init__(
        self, owner: Owner, seen: int, index: Tensor, valid: Tensor, padded: bool, shift: Tensor,
        evicted: Tensor | None = None, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.owner, self.seen, self.index, self.valid = owner, seen, index, valid
        self.padded, self.shift, self.evicted, self.bias = padded, shift, evicted, bias
        self._derived: tuple[Any, Ledger] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        gone = None if self.evicted is None else self.evicted.clone()
        bias = None if self.bias is None else self.bias.clone()
        tensors = (self.index.clone(), self.valid.clone(), self.padded, self.shift.clone(), gone)
        memo[id(self)] = copied = Ledger(self.owner, self.seen, *tensors, bias)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_derived": None, "owner": (self.owner.key, self.owner.name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, owner=_owner(*state["owner"]))

    @classmethod
    def of_plain(
        cls, owner: Owner, batch: int, length: int, mask: Tensor | None, device: Any
    ) -> Ledger:
        """The ledger of an ordinary cache of ``length`` tokens."""
        table = SlotTable.identity(
            batch, length, None if mask is None else mask[:, :length], device
        )
        shift = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(owner, length, table.index, table.valid, table.padded, shift)

    @classmethod
    def empty(cls, owner: Owner, like: SlotTable) -> Ledger:
        """The ledger of a cache that nothing was written to."""
        zero = torch.zeros(len(like.index), dtype=torch.long, device=like.index.device)
        return cls(owner, 0, like.index[:, :0], like.valid[:, :0], False, zero)

    def appended(self, table: SlotTable, shift: Tensor) -> Ledger:
        """The ledger after a forward whose new slots are ``table``."""
        return Ledger(
            self.owner,
            self.seen + table.length,
            torch.cat([self.index, table.index + self.seen], dim=1),
            torch.cat([self.valid, table.valid], dim=1),
            self.padded or table.padded,
            shift,
            self.evicted,
            joined_bias(self, table),
        )

    def thinned(self, table: SlotTable, shift: Tensor, stay: Tensor) -> Ledger:
        """The same, of new slots that the rows ``stay`` ``[B]`` alone store; of none, no slot."""
        stay = stay.to(table.valid.device)
        if bool(stay.any()):
            valid = table.valid & stay[:, None]
            return self.appended(replace(table, valid=valid, padded=True), shift)
        return Ledger(
            self.owner, self.seen + table.length, self.index, self.valid, self.padded, shift,
            self.evicted, self.bias,
        )  # fmt: skip

    def derive(self, key: Any, rows: Callable[[Tensor], Tensor]) -> Ledger:
        """Apply ``rows`` to every tensor, once for all layers that share this ledger."""
        if self._derived is None or self._derived[0] is not key:
            new = Ledger(
                self.owner,
                self.seen,
                rows(self.index),
                rows(self.valid),
                self.padded,
                rows(self.shift),
                None if self.evicted is None else rows(self.evicted),
                None if self.bias is None else rows(self.bias),
            )
            self._derived = (key, new)
        return self._derived[1]

    def stale(self, window: int) -> int:
        """Leading slots that lie outside of the window of every token to come, in every row."""
        inside = (self.index > self.seen - window).any(0)
        return int(inside.to(torch.uint8).argmax()) if bool(inside.any()) else inside.numel()

    def without(self, count: int) -> Ledger:
        """The ledger of what is left when the first ``count`` slots are let go."""
        if not count:
            return self
        key = ("without", count)
        if self._derived is None or self._derived[0] != key:
            left = Ledger(
                self.owner, self.seen, self.index[:, count:], self.valid[:, count:],
                self.padded, self.shift, self.evicted, _cut(self.bias, slice(count, None)),
            )  # fmt: skip
            self._derived = (key, left)
        return self._derived[1]

    def hiding(self, mask: Tensor) -> Ledger:
        """The ledger under a padding mask ``[B, seen + R]`` that may hide tokens of earlier turns.

        Raises:
            ConfigError: it hides what was there when heads were left with tokens of their own.
        """
        if self.evicted is not None:
            then = mask[:, : self.evicted.shape[1]].to(self.evicted.device)
            if bool((self.evicted & ~then).any()):
                raise ConfigError(
                    "The attention mask hides tokens of a prompt whose cache was evicted since: "
                    "each head keeps tokens of its own. Pass the mask that the prompt came with, "
                    "or start the prompt anew."
                )
        apart = self.index < 0
        shown = mask.to(self.index.device).gather(1, self.index.clamp(min=0)) | apart
        visible = self.valid & shown
        if torch.equal(visible, self.valid):
            return self
        return Ledger(
            self.owner, self.seen, self.index, visible, True, self.shift, self.evicted, self.bias
        )

    def cropped(self, count: int) -> Ledger:
        """Remove the last ``count`` tokens.

        Raises:
            ConfigError: the cut would reach into a pruned prompt.
        """
        if self._derived is not None and self._derived[0] == ("crop", count):
            return self._derived[1]
        tail = torch.arange(self.seen - count, self.seen, device=self.index.device)
        if count > self.index.shape[1] or not bool((self.index[:, -count:] == tail).all()):
            raise ConfigError(
                f"Cannot crop {count} tokens from this cache: some of them were pruned. Only "
                f"tokens after the last picture can be taken back; start the prompt anew instead."
            )
        new = Ledger(
            self.owner, self.seen - count, self.index[:, :-count], self.valid[:, :-count],
            self.padded, self.shift, self.evicted, _cut(self.bias, slice(None, -count)),
        )  # fmt: skip
        self._derived = (("crop", count), new)
        return new


def _cut(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[:, part]


def joined_bias(old: Ledger | None, table: SlotTable) -> Tensor | None:
    """What attention adds to stored and new slots, ``[B, C + P]``, where it adds anything."""
    parts = [None if old is None else old.bias, table.bias]
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    sizes = (0 if old is None else old.index.shape[1], table.num_slots)
    return torch.cat(
        [
            like.new_zeros(len(like), size) if part is None else part.to(like.device)
            for part, size in zip(parts, sizes, strict=True)
        ],
        dim=1,
    )


class SlotLayer(DynamicLayer):
    """Keys and values of the slots that were kept, ``[B, H, P, d]``, with their ledger.

    ``get_seq_length`` is logical, so positions continue as if nothing had been dropped;
    ``keys.shape[-2]`` is physical. What a run has to know of the slots besides is ``noted``, by
    name, ``[B, ...]``; it goes with its samples.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, ledger: Ledger, window: int | None = None
    ) -> None:
        super().__init__()
        self.window, self.trimmed = window, False
        self.noted: dict[str, Tensor] = {}
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.ledger = keys, values, ledger
        self.is_initialized = True

    def forget_last(self, count: int) -> None:
        """Let go of the last slots, which the ledger does not name."""
        self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]

    def settle(self, ledger: Ledger, stale: int) -> None:
        """Take the ledger of what is stored, without its first slots, which no query will see."""
        self.ledger = ledger.without(stale)
        if stale:
            self.keys, self.values = self.keys[..., stale:, :], self.values[..., stale:, :]
            self.trimmed = True

    def _check(self) -> None:
        owner = self.ledger.owner
        if not owner.active:
            raise UnsupportedModel(
                f"This cache was written under visprune.prune(..., {owner.name!r}), which has been "
                f"removed: its layers hold fewer tokens than the model would count. Continue "
                f"inside the run, or start again with a new cache."
            )

    def get_seq_length(self) -> int:
        """Tokens seen (logical)."""
        self._check()
        return self.ledger.seen

    @property
    def num_stored(self) -> int:
        """Slots stored (physical)."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys: the stored slots count as the last of those seen."""
        self._check()
        stored = self.num_stored
        return stored + int(query_length), self.ledger.seen - stored

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new slots; returns all keys and values."""
        if not self.ledger.owner.active:
            self._check()
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        raise ConfigError("A pruned cache cannot be reset in place; make a new DynamicCache.")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, logically and physically.

        A positive number is the length to be left, as transformers before 5.16 has it.
        """
        seen = self.ledger.seen
        count = max(0, seen - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if count and self.trimmed:
            raise ConfigError(
                f"Cannot crop {count} tokens from this cache: its sliding-window layers have let "
                f"go of what the tokens before would see. Start the prompt anew instead."
            )
        if count:
            self.ledger = self.ledger.cropped(count)
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]

    def _note(self, rows: Callable[[Tensor], Tensor]) -> None:
        self.noted = {name: rows(x) for name, x in self.noted.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        super().reorder_cache(beam_idx)
        self._note(lambda x: x.index_select(0, beam_idx.to(x.device)))
        self.ledger = self.ledger.derive(
            beam_idx, lambda x: x.index_select(0, beam_idx.to(x.device))
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        super().batch_repeat_interleave(repeats)
        self._note(lambda x: x.repeat_interleave(repeats, dim=0))
        self.ledger = self.ledger.derive(repeats, lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        super().batch_select_indices(indices)
        self._note(lambda x: x[indices.to(x.device)])
        self.ledger = self.ledger.derive(indices, lambda x: x[indices.to(x.device)])


def check_cache(cache: Any, *, windows: bool = False) -> None:
    """Refuse caches whose layers cannot hold a pruned prompt.

    Args:
        cache: of a call.
        windows: whether the decoder has sliding-window layers that are pruned.

    Raises:
        UnsupportedModel: with the kind given and the kinds that work.
    """
    if cache is None:
        return
    if not isinstance(cache, DynamicCache) or getattr(cache, "is_compileable", False):
        raise UnsupportedModel(
            f"A pruned model stores a different number of tokens than it has seen, which "
            f"{type(cache).__name__} cannot hold. Use a DynamicCache (the default of generate; "
            f"no cache_implementation)."
        )
    kinds: tuple[type, ...] = (DynamicLayer, *STATES)
    if windows:
        kinds = (DynamicLayer, DynamicSlidingWindowLayer, *STATES)
    for number, layer in enumerate(cache.layers):
        if type(layer) not in kinds and not isinstance(layer, SlotLayer):
            raise UnsupportedModel(
                f"Layer {number} of the cache is a {type(layer).__name__}; visprune prunes "
                f"{' and '.join(kind.__name__ for kind in kinds)} only."
            )


def open_windows(cache: Any, config: Any) -> Any:
    """Let sliding-window layers of an empty cache hold every slot, until ledgers say which to keep.

    Args:
        cache: of a call, or ``None``.
        config: of the decoder, for a new one.

    Returns:
        The cache; a new one for ``None``.

    Raises:
        UnsupportedModel: such a layer holds tokens that no run has counted.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is not DynamicSlidingWindowLayer:
            continue
        if layer.get_seq_length():
            raise UnsupportedModel(
                "The cache holds a turn without a picture, of which sliding-window layers have let "
                "go of tokens. Give the conversation in one prompt, with its pictures."
            )
        cache.layers[number] = DynamicLayer()
    return cache


def stored_length(cache: Cache | None, layer: int) -> int:
    """Slots that ``layer`` of ``cache`` stores."""
    if cache is None or layer >= len(cache.layers):
        return 0
    entry = cache.layers[layer]
    if isinstance(entry, SlotLayer):
        return entry.num_stored
    return int(entry.get_seq_length()) if isinstance(entry, CacheLayerMixin) else 0


def ledger_of(cache: Cache | None, layer: int) -> Ledger | None:
    """The ledger of ``layer``, if a run wrote it."""
    if cache is None or layer >= len(cache.layers):
        return None
    entry = cache.layers[layer]
    return entry.ledger if isinstance(entry, SlotLayer) else None


def adopt(
    cache: Cache,
    ledger_for: Callable[[int], Ledger],
    window_of: Callable[[int], int | None] | None = None,
) -> None:
    """Give every layer of ``cache`` the ledger of what it now stores, in place.

    Args:
        cache: as a forward left it.
        ledger_for: of a layer, the ledger of all its slots.
        window_of: of a layer, how far its queries see; slots that none will see are let go.
            ``None``: all see all.
    """
    stale: dict[tuple[int, int], int] = {}
    for number, entry in enumerate(cache.layers):
        if getattr(entry, "keys", None) is None:  # a recurrent layer, or one that ran not
            continue
        ledger, window = ledger_for(number), None if window_of is None else window_of(number)
        if not isinstance(entry, SlotLayer):
            entry = SlotLayer(entry.keys, entry.values, ledger, window)
            cache.layers[number] = entry
        if window is None:
            entry.ledger = ledger
            continue
        key = (id(ledger), window)
        if key not in stale:
            stale[key] = ledger.stale(window)
        entry.settle(ledger, stale[key])
