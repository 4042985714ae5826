# SPDX-License-Identifier: Apache-2.0
"""Evict from the cache of a prompt: each layer is looked at as it runs, all are cut at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import SlotLayer, ledger_of
from visprune.backbones.hf.probe import Attended, Wanted, watch
from visprune.backbones.hf.ragged import RaggedLayer
from visprune.backbones.hf.rotary import turns_halves
from visprune.backbones.vlm.base import VLMAdapter
from visprune.core.cache import (
    Amount,
    CacheSeen,
    CacheStage,
    CacheTrace,
    Counted,
    Drop,
    Gated,
    Looked,
)
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.cache.again import (
    PICTURED,
    due,
    note_kept,
    note_scores,
    received_of,
    watched,
)
from visprune.machine.cache.store import RowSlots, store
from visprune.machine.choose import Observer
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.images import ImageState
from visprune.machine.decoder.reading import timed


@dataclass
class Sample:
    """One layer of one sample: what was looked at, and which physical slots it was.

    Attributes:
        places: the slots of the layer's cache that hold no padding, ``[L]``.
        looked: ``None``: the sample has no picture, and stays whole.
    """

    places: Tensor
    looked: Looked | None = None


@dataclass
class Looks:
    """All that a call has shown so far.

    Attributes:
        layers: by layer and sample.
        due: layers that are cut at its end.
    """

    layers: dict[int, list[Sample]] = field(default_factory=dict)
    due: set[int] = field(default_factory=set)


class CacheEviction:
    """The stage of a method at the cache of one model.

    Args:
        adapter: the model family.
        name: of the method, for messages.
        stage: what is done.
        chained: whether other methods act before it; a share is then one of what these leave.
        observers: whom the time of it is counted for.
        current: the forward that is under way in this thread.
        compact: whether positions close up.
        learned: modules that the method brings, one for each decoder layer.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        name: str,
        stage: CacheStage,
        chained: bool,
        observers: Sequence[Observer],
        current: Callable[[], Forward | None],
        compact: bool = False,
        learned: Any = None,
    ) -> None:
        self._learned = learned
        self._adapter, self._name, self._observers = adapter, name, observers
        self._eviction, self._current, self._chained = stage.eviction, current, chained
        if stage.eviction.action.closes and not compact:
            self._eviction = replace(stage.eviction, action=Drop())
        self._layers = [n for n in range(len(adapter.layers)) if evictable(adapter, n)]
        if not self._layers:
            raise UnsupportedModel(
                f"{name} evicts from layers that see the whole sequence, and "
                f"{adapter.config.model_type} has none: each sees a window or keeps a state."
            )

        kernel = str(adapter.text_config._attn_implementation)
        if stage.eviction.action.hides and kernel not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"{name} hides a slot that it stores, and {kernel} takes no bias per key. Use "
                f"model.set_attn_implementation('sdpa'), or the rule without this option."
            )
        eviction = self._eviction
        heads = isinstance(eviction.budget, Gated) or type(eviction.action) is not Drop
        if heads and any(stores_latents(adapter, n) for n in self._layers):
            raise UnsupportedModel(
                f"{adapter.config.model_type} stores one latent for all heads, from which their "
                f"keys and values are made; {name} treats heads apart, or changes keys. Use a "
                f"method that drops slots, such as snapkv."
            )

    def install(self) -> list[Any]:
        """Watch the attention of the layers that are evicted; returns what undoes it."""
        return [watch(self._adapter.attention(n), partial(self._wanted, n)) for n in self._layers]

    def check(self, fwd: Forward, caches: bool) -> None:
        """Before the decoder: refuse what cannot work.

        Args:
            fwd: the call.
            caches: whether it has or makes a cache.

        Raises:
            ConfigError: no cache, or another picture after the eviction.
            UnsupportedModel: a 4-D mask over an evicted cache.
        """
        evicted = any(self._evicted(fwd, n) for n in self._layers)
        if evicted and fwd.mask4d is not None:
            raise UnsupportedModel(
                "A 4-D mask speaks of every token, and heads of this cache keep tokens of their "
                "own. Pass a 2-D padding mask."
            )
        if not fwd.images:
            return
        if evicted:
            raise ConfigError(
                f"{self._name} has evicted from this cache after its first prompt; a picture of a "
                f"later turn would be a second eviction. Give the conversation in one prompt, or "
                f"start a new cache."
            )
        if not caches:
            raise ConfigError(
                f"{self._name} shrinks the cache of a prompt, and use_cache=False makes none. Call "
                f"the model with use_cache=True, or use a method that acts before the decoder."
            )

    def expect(self, fwd: Forward) -> None:
        """Tell layers that store heads apart which of the new tokens are padding."""
        if fwd.cache is None:
            return
        valid = fwd.table.valid if fwd.table.padded else None
        for entry in fwd.cache.layers:
            if isinstance(entry, RaggedLayer):
                entry.expect(valid)

    def _evicted(self, fwd: Forward, layer: int) -> bool:
        ledger = ledger_of(fwd.cache, layer)
        return ledger is not None and ledger.evicted is not None

    # While the prompt is read ------------------------------------------------------------------

    def _wanted(self, layer: int) -> Wanted | None:
        fwd = self._current()
        if fwd is None:
            return None
        if fwd.images:
            return Wanted(partial(self._look, layer, fwd, True))
        entry = None if self._eviction.every is None else watched(fwd, layer)
        if entry is None:
            return None
        cut = due(self._eviction, fwd, entry)
        if not (cut or self._eviction.score.running):
            return None
        return Wanted(partial(self._look, layer, fwd, cut))

    def _look(self, layer: int, fwd: Forward, cut: bool, attended: Attended) -> None:
        if fwd.looks is None:
            fwd.looks = Looks()
        if cut:
            fwd.looks.due.add(layer)
        ledger, table = fwd.ledger(layer), fwd.table
        stored = attended.key.shape[2] - table.num_slots
        valid = table.valid
        if stored:
            old = ledger.valid if ledger is not None else valid.new_ones(fwd.batch, stored)
            valid = torch.cat([old.to(valid.device), valid], dim=1)
        entry = watched(fwd, layer)
        pictured = {image.layout.row for image in fwd.images if len(image.tokens)}
        if entry is not None:
            pictured = set(entry.noted[PICTURED].nonzero()[:, 0].tolist())
        found = []
        with timed(fwd, self._observers), torch.no_grad():
            for row in range(fwd.batch):
                places = valid[row].nonzero()[:, 0]
                sample = Sample(places)
                if row in pictured:
                    sample.looked = self._of(layer, fwd, attended, row, places, stored)
                found.append(sample)
        fwd.looks.layers[layer] = found

    def _of(
        self, layer: int, fwd: Forward, attended: Attended, row: int, places: Tensor, stored: int
    ) -> Looked:
        seen, images = _seen(fwd, layer, attended, row, places, stored)
        eviction, entry = self._eviction, watched(fwd, layer)
        if entry is not None and eviction.score.running:
            seen.carried = received_of(entry, row, places)
        if eviction.score.turns or eviction.action.closes:
            _show_rotation(seen, fwd, layer, attended, row, places[places >= stored] - stored)
        seen.learned = None if self._learned is None else self._learned[layer]
        seen.text_observes = eviction.scope.kind == "visual"
        seen.free = eviction.scope.free(seen.free, seen.prompt)
        pictures = [image.layout.picture for image in images]
        left = [len(image.tokens) for image in images]
        had = left if self._chained else [len(picture.pos) for picture in pictures]
        counted = Counted(
            free=int(seen.free.sum()),
            prompt=seen.prompt,
            pictures=tuple(zip(left, had, strict=True)),
            frames=tuple(picture.frames for picture in pictures),
        )
        amount: Amount = eviction.amount
        looked = eviction.look(seen, amount.resolve(counted))
        if stores_latents(self._adapter, layer):
            looked.score = looked.score.mean(0, keepdim=True)
        fwd.trace.spend(row, seen.spent)
        return looked

    # When it has been read ---------------------------------------------------------------------

    def finish(self, fwd: Forward, cache: Any) -> None:
        """Cut the cache that a call has filled, and note what is left of it."""
        looks = fwd.looks
        if looks is None or cache is None:
            return
        with timed(fwd, self._observers), torch.no_grad():
            kept = self._share(looks, fwd.batch)
            if looks.due:
                fwd.trace.cache = CacheTrace.empty(fwd.batch)
            shared: dict[Any, Any] = {}
            for number, entry in enumerate(cache.layers):
                made, rows = entry, self._rows(looks, number, entry, kept)
                if fwd.trace.cache is not None:
                    made = store(entry, rows, fwd, shared, fwd.trace.cache)
                if self._eviction.every is not None and isinstance(made, SlotLayer):
                    self._note(looks, number, entry, made, rows)
                cache.layers[number] = made

    def _note(
        self, looks: Looks, number: int, entry: Any, made: SlotLayer, rows: list[RowSlots] | None
    ) -> None:
        """Note what has to be known when a layer is cut again."""
        samples = looks.layers.get(number)
        if samples is None:
            return
        if rows is not None:
            scores = [None if x.looked is None else x.looked.score for x in samples]
            note_kept(made, entry, rows, scores)
        elif self._eviction.score.running:
            note_scores(made, samples)
        pictured = [sample.looked is not None for sample in samples]
        made.noted[PICTURED] = torch.tensor(pictured, device=made.keys.device)

    def _share(self, looks: Looks, batch: int) -> dict[tuple[int, int], list[Tensor]]:
        """The slots that stay, by layer and sample and for each head."""
        found = {}
        for row in range(batch):
            mine = [(n, of[row].looked) for n, of in sorted(looks.layers.items())]
            known = [looked for _, looked in mine if looked is not None]
            if not known:
                continue
            counts = self._eviction.budget.share(known)
            for looked, count in zip(known, counts, strict=True):
                count = count.clamp(min=0, max=looked.num_free)
                found[looked.layer, row] = looked.kept(count)
        return found

    def _rows(
        self, looks: Looks, number: int, entry: Any, kept: dict[tuple[int, int], list[Tensor]]
    ) -> list[RowSlots] | None:
        """What each sample keeps of a layer; ``None``: it stays as it is."""
        samples = looks.layers.get(number)
        if number not in looks.due or samples is None or not any(x.looked for x in samples):
            return None
        action = self._eviction.action
        if action.exact and all(
            all(len(index) == len(sample.places) for index in kept[number, row])
            for row, sample in enumerate(samples)
            if sample.looked is not None
        ):
            return None
        found = []
        for row, sample in enumerate(samples):
            key, value = (x[row][:, sample.places] for x in (entry.keys, entry.values))
            if sample.looked is None:
                found.append(RowSlots.whole(key, value, sample.places))
                continue
            heads = action.apply(key, value, kept[number, row], sample.looked)
            closed = len(sample.places) - len(heads[0].index) if action.closes else 0
            tail = _tail(sample.looked)
            found.append(RowSlots(heads, sample.places, tail, closed, action.hides))
        return found


def evictable(adapter: VLMAdapter, layer: int) -> bool:
    """Whether a layer's cache grows with the sequence, whole, and serves that layer alone."""
    if adapter.kind_of(layer) != "full_attention" or adapter.window(layer) is not None:
        return False
    served = [n for n in range(len(adapter.layers)) if adapter.keeper(n) == layer]
    return [n for n in served if n not in adapter.recurrent] == [layer]


def stores_latents(adapter: VLMAdapter, layer: int) -> bool:
    """Whether a layer's cache holds latents, one for all heads (multi-head latent attention)."""
    return getattr(adapter.attention(layer), "kv_lora_rank", None) is not None


def _tail(looked: Looked) -> int:
    """Slots behind the last one that may leave, which all heads have."""
    free = looked.free.nonzero()[:, 0]
    return len(looked.free) - 1 - int(free[-1]) if len(free) else len(looked.free)


def _seen(
    fwd: Forward, layer: int, attended: Attended, row: int, places: Tensor, stored: int
) -> tuple[CacheSeen, list[ImageState]]:
    """One sample's part of what a layer attends to, and its pictures."""
    device, total = attended.key.device, attended.key.shape[2]
    new = places[places >= stored] - stored
    images = [image for image in fwd.images if image.layout.row == row]
    movable = torch.zeros(total, dtype=torch.bool, device=places.device)
    visual = movable.clone()
    for image in images:
        movable[image.slots + stored] = True
        visual[torch.cat([image.slots, image.fixed]) + stored] = True
    ends = len(places)
    if images:
        ends -= len(new) - int((fwd.prompt_slots()[row][new]).sum())
    where, at = places.to(device), new.to(device)

    def mask(queries: Tensor) -> Tensor | None:
        if fwd.masks is None and fwd.mask4d is None and not fwd.weighed(layer):
            return None
        rows = new.to(queries.device)[queries].expand(fwd.batch, -1)
        seen = fwd.row_mask(layer, rows)
        if seen is None:
            return None
        return seen[min(row, len(seen) - 1)][None][..., where]

    seen = CacheSeen(
        query=attended.query[row][:, at],
        key=attended.key[row][:, where],
        value=attended.value[row][:, where],
        free=movable[places].to(device),
        visual=visual[places].to(device),
        prompt=ends,
        scale=attended.scale,
        softcap=attended.softcap,
        mask=mask,
        layer=layer,
        num_layers=len(fwd.adapter.layers),
    )
    return seen, images


def _show_rotation(
    seen: CacheSeen, fwd: Forward, layer: int, attended: Attended, row: int, new: Tensor
) -> None:
    """Positions of the new slots and what turns them, if they are a line and heads turn whole."""
    adapter, width = fwd.adapter, attended.query.shape[-1]
    if adapter.multi_axis_rope or not turns_halves(adapter.attention(layer), width):
        return
    query = attended.query[:1, :1, :1].clone()  # of which device and dtype; it is kept for long
    positions = fwd.table_positions(fwd.table, layer)

    def turn(ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = adapter.rotary(query, ids[None], adapter.kind_of(layer))
        return cos[0].float(), sin[0].float()

    places = positions[min(row, len(positions) - 1)][new.to(positions.device)]
    seen.turn, seen.places = turn, places.to(query.device)
