# SPDX-License-Identifier: Apache-2.0
"""One call of the language model under a run: its slots, layer by layer, and what goes with them.

A :class:`Forward` is built whole from the arguments of the call, belongs to that call alone, and is
written here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visprune import ops
from visprune.backbones.hf.cache import (
    Ledger,
    Owner,
    SlotLayer,
    adopt,
    cache_of,
    ledger_of,
    stored_length,
)
from visprune.backbones.hf.masks import gather_mask, slot_mask, window_mask
from visprune.backbones.vlm.base import ImageLayout, VLMAdapter
from visprune.core.selection import Selection
from visprune.core.signals.base import Signal
from visprune.core.slots import SlotTable, assemble, gather_sequence
from visprune.core.trace import Trace
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.decoder.images import Entered, ImageState, Step


class Forward:
    """One call of the language model under a run.

    Args:
        adapter: the model family.
        owner: the run, for the caches that it writes.
        layouts: the images of this call, in order.
        kwargs: the arguments of the call; ``inputs_embeds`` is among them.
        compact: whether position ids close up over dropped tokens.
        prompt: tokens of the prompt, an answer behind them not counted: one number, or one per row
            ``[B]``, counted in columns from the beginning of the cache; ``None``: all.
        masks: of a decoder whose layers see windows: the masks of the whole call, by kind.

    Raises:
        ConfigError: the attention mask does not cover the cached and the new tokens.
        UnsupportedModel: a mask of another kind.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        owner: Owner,
        layouts: list[ImageLayout],
        kwargs: dict[str, Any],
        *,
        compact: bool,
        prompt: int | Tensor | None = None,
        masks: dict[str, Any] | None = None,
    ) -> None:
        self.masks = masks
        self.adapter, self.owner, self.compact = adapter, owner, compact
        self.trace = Trace(positions="compact" if compact else "original")
        self.entered: dict[int, Entered] = {}
        self.signals: dict[Signal, Tensor] = {}
        self.later: dict[int, Tensor] = {}
        self._memo: dict[Any, Any] = {}
        embeds: Tensor = kwargs["inputs_embeds"]
        self.batch, self.length = embeds.shape[:2]
        self.device = embeds.device
        self.cache = cache_of(kwargs)
        self.seen = int(self.cache.get_seq_length()) if self.cache is not None else 0
        self.mask2d, self.mask4d = _read_mask(
            kwargs.get("attention_mask"), self.seen, self.length, self.device
        )
        new = None if self.mask2d is None else self.mask2d[:, self.seen :]
        self.table = SlotTable.identity(self.batch, self.length, new, self.device)
        ends_padded = self.table.padded and not bool(self.table.valid[:, -1].all())
        self.pad_side = "right" if ends_padded else "left"
        self._positions: Tensor | None = kwargs.get("position_ids")
        self.start_layers()
        self._prompt = prompt
        self.images: list[ImageState] = []
        self.alive: list[int] = []
        self.visual = [0] * self.batch
        if layouts:
            last = [self.length - 1] * self.batch
            self.alive = [self.length] * self.batch
            if self.table.padded:
                last = self.table.last_valid().tolist()
                self.alive = self.table.valid.sum(1).tolist()
            self.images = [ImageState.start(layout, last[layout.row]) for layout in layouts]
            for image in self.images:
                self.visual[image.layout.row] += len(image.tokens)

    def start_layers(self) -> None:
        """Take the current table as the one that the language model is called with."""
        self.first = self.table
        steps = torch.arange(self.table.num_slots, device=self.device)
        self.rel = steps.expand(self.batch, -1)

    def full_positions(self) -> Tensor:
        """Position ids of the input, as given or as the model would count them."""
        if self._positions is None:
            count = torch.arange(self.seen, self.seen + self.length, device=self.device)
            self._positions = count[None]
        return self._positions

    # The prompt ------------------------------------------------------------------------------

    def prompt_ends(self) -> Tensor:
        """The column of each row's query, the last token of its prompt, ``[B]``."""
        if "ends" not in self._memo:
            whole = SlotTable.identity(
                self.batch, self.length, self.first_valid if self.mask2d is not None else None,
                self.device,
            )  # fmt: skip
            ends = whole.last_valid()
            if self._prompt is not None:
                told = torch.as_tensor(self._prompt, device=self.device) - self.seen - 1
                told = told.expand(self.batch)
                ends = torch.where(told < 0, ends, torch.minimum(ends, told))
            self._memo["ends"] = ends
        return self._memo["ends"]

    @property
    def prompt_goes_on(self) -> bool:
        """Whether the prompt ends behind this call, which is a part of it (chunked prefill)."""
        if self._prompt is None:
            return False
        return int(torch.as_tensor(self._prompt).max()) > self.seen + self.length

    def query_slots(self) -> Tensor:
        """The slot of each row's query, ``[B]``."""
        ends = self.prompt_ends()[:, None]
        return ((self.table.index == ends) & self.table.real).to(torch.uint8).argmax(dim=1)

    def prompt_slots(self) -> Tensor:
        """Which slots belong to the prompt, ``[B, P]``."""
        return self.table.index <= self.prompt_ends()[:, None]

    def visual_slots(self) -> Tensor:
        """Which slots hold visual tokens, protected ones too, ``[B, P]``."""
        visual = torch.zeros_like(self.table.valid)
        for image in self.images:
            visual[image.layout.row, image.slots] = True
            visual[image.layout.row, image.fixed] = True
        return visual

    # The cache -------------------------------------------------------------------------------

    def ledger(self, layer: int) -> Ledger | None:
        """What the cache of ``layer`` holds, or ``None`` if it is empty."""
        if self.seen == 0:
            return None
        found = ledger_of(self.cache, layer)
        if found is None:
            key = ("plain", self.seen)
            if key not in self._memo:
                self._memo[key] = Ledger.of_plain(
                    self.owner, self.batch, self.seen, self.mask2d, self.device
                )
            return self._memo[key]
        if self.mask2d is None or self.length == 1:
            return found
        return self._hidden_since(found)

    def _hidden_since(self, ledger: Ledger) -> Ledger:
        """Respect a padding mask that hides tokens of earlier turns."""
        key = ("hidden", ledger)
        if key not in self._memo and self.mask2d is not None:
            visible = ledger.valid & self.mask2d.gather(1, ledger.index)
            if not torch.equal(visible, ledger.valid):
                ledger = Ledger(self.owner, ledger.seen, ledger.index, visible, True, ledger.shift)
            self._memo[key] = ledger
        return self._memo[key]

    # What a layer is given -------------------------------------------------------------------

    @property
    def uneven(self) -> bool:
        """Whether some layer must be given other masks or positions than the first.

        A single new token that sees every slot needs none, where the kernel takes none.
        """
        first = self.ledger(0)
        if first is None:
            return False
        plain = self.length == 1 and not (self.compact or first.padded or self.table.padded)
        plain = plain and self.mask4d is None and self.adapter.maskless
        layers = range(len(self.adapter.layers))
        for layer in layers:
            ledger = self.ledger(layer)
            if ledger is not first and not (plain and ledger and not ledger.padded):
                return True
        return False

    def visible(self, layer: int, table: SlotTable) -> Tensor | None:
        """Which stored and new slots of ``layer`` may be attended to; ``None`` for all."""
        ledger = self.ledger(layer)
        if not table.padded and (ledger is None or not ledger.padded):
            return None
        if ledger is None:
            return table.valid
        return torch.cat([ledger.valid.to(table.valid.device), table.valid], dim=1)

    def model_mask(self) -> Tensor | None:
        """The mask that the language model is called with (for the layers before any stage)."""
        table = self.table
        if self.mask4d is not None:
            return self.cut(0, table)
        valid = self.visible(0, table)
        if valid is None:
            # Without a cache, gaps in the position ids look like packed sequences unless there is
            # a mask.
            return table.valid if self.images and self.cache is None else None
        unseen = self.seen + table.num_slots - valid.shape[1]
        return torch.nn.functional.pad(valid, (unseen, 0), value=False)

    def layer_mask(self, layer: int, hidden: Tensor) -> Any:
        """The mask of a layer whose slots differ from the first layer's."""
        table, ledger = self.table, self.ledger(layer)
        key = ("mask", self.adapter.kind_of(layer), table, ledger, hidden.device)
        if key not in self._memo:
            if self.masks is not None and not self._plain(layer):
                mask = self._by_place(layer, hidden.dtype)
            elif self.mask4d is not None:
                mask = self.cut(layer, table)
            else:
                stored = stored_length(self.cache, layer)
                mask = slot_mask(
                    self.adapter.text_config, hidden, self.visible(layer, table), stored
                )
            self._memo[key] = mask
        return self._memo[key]

    def _plain(self, layer: int) -> bool:
        """Whether the whole call is causal at a layer, and shorter than its window."""
        assert self.masks is not None, "only of such decoders"
        return self.masks[self.adapter.kind_of(layer)] is None and self.ledger(layer) is None

    def _by_place(self, layer: int, dtype: torch.dtype) -> Tensor | None:
        """The mask of a layer that may see a window, or both ways within a picture."""
        assert self.masks is not None, "only of such decoders"
        table, ledger = self.table, self.ledger(layer)
        if self.mask4d is not None and ledger is not None:
            raise UnsupportedModel(
                "A 4-D mask of a later turn is not cut down for sliding-window layers; pass a 2-D "
                "padding mask, or the conversation in one prompt."
            )
        given = self.masks[self.adapter.kind_of(layer)]
        old = table.index[:, :0] if ledger is None else ledger.index
        old_valid = table.valid[:, :0] if ledger is None else ledger.valid
        eager = self.adapter.text_config._attn_implementation == "eager"
        mask = window_mask(
            given,
            table.index + self.seen,
            old,
            old_valid,
            table.index,
            table.real if given is not None else table.valid,
            window=self.adapter.window(layer),
            additive=dtype if eager else None,
        )
        # A kernel that is given no mask for one query that sees all computes other last bits.
        if not eager and table.num_slots == 1 and bool(mask.all()):
            return None
        return mask

    def cut(self, layer: int, table: SlotTable) -> Tensor:
        """The user's 4-D mask, cut down to the slots of ``table`` at ``layer``."""
        ledger = self.ledger(layer)
        assert self.mask4d is not None, "only called with a 4-D mask"
        key, valid = table.index + self.seen, table.valid
        if ledger is not None:
            key = torch.cat([ledger.index, key], dim=1)
            valid = torch.cat([ledger.valid, valid], dim=1)
        return gather_mask(self.mask4d, table.index, key, valid)

    def row_mask(self, layer: int, at: Tensor) -> Tensor | None:
        """What the queries in the slots ``at`` ``[B, R]`` of ``layer`` may see, beyond causality.

        Returns:
            Broadcastable to ``[B, H, R, stored + P]``: bool (true: visible) or added to scores.
        """
        own = self.cut(layer, self.table) if self.mask4d is not None else None
        if self.masks is not None and not self._plain(layer):
            own = self._by_place(layer, torch.float32)
        if own is not None:
            own = own.to(at.device)
            wanted = at[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
            return own.gather(2, wanted)
        valid = self.visible(layer, self.table)
        return None if valid is None else valid[:, None, None].to(at.device)

    def table_positions(self, table: SlotTable, layer: int) -> Tensor:
        """Position ids of the slots of ``table``."""
        if not self.compact:
            return gather_sequence(self.full_positions(), table.index, -1)
        # Ids close up in slot order, also where a merged slot stands behind its own token's place.
        end = -1 if self.pad_side == "left" else self.length
        index = torch.where(table.real, table.index, end).sort(dim=1).values
        index = index.clamp(0, self.length - 1)
        ids = gather_sequence(self.full_positions(), index, -1)
        gone = self.first_valid & ~table.kept()
        before = torch.cumsum(gone.long(), dim=1) - gone.long()
        ids = ids - before.gather(1, index).to(ids.device)
        ledger = self.ledger(layer)
        return ids if ledger is None else ids - ledger.shift[:, None].to(ids.device)

    @property
    def first_valid(self) -> Tensor:
        """Validity of the input tokens ``[B, S]``."""
        if self.mask2d is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        return self.mask2d[:, self.seen :]

    def rotary(self, layer: int, hidden: Tensor, given: Any) -> Any:
        """Position embeddings of a layer whose slots differ from the first layer's.

        Layers of one kind (full, sliding-window) share theirs; those of another kind have another
        rotary embedding.
        """
        ledger, kind = self.ledger(layer), self.adapter.kind_of(layer)
        shifted = self.compact and ledger is not None and ledger is not self.ledger(0)
        if self.table is self.first and not shifted:
            return given
        key = ("rotary", kind, self.table, ledger if shifted else None, hidden.device)
        if key not in self._memo:
            if self.compact:
                ids = self.table_positions(self.table, layer)
                made = self.adapter.rotary(hidden, ids, kind)
            else:
                made = tuple(gather_sequence(part, self.rel, -2) for part in given)
            self._memo[key] = made
        return self._memo[key]

    def layer_positions(self, layer: int, given: Tensor) -> Tensor:
        """Position ids that a layer reads itself, ``[B, P]``; ``given``: those of the first."""
        ledger = self.ledger(layer)
        if self.compact and self.differs(layer) and ledger is not self.ledger(0):
            return self.table_positions(self.table, layer)
        return given if self.table is self.first else gather_sequence(given, self.rel, -1)

    def by_token(self, given: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
        """Other arguments that have one row a token, ``[B, S, ...]``, of the slots ``index``."""
        found = {}
        for name, value in given.items():
            if isinstance(value, Tensor) and self.images:
                at = index.to(value.device).reshape(*index.shape, *[1] * (value.dim() - 2))
                found[name] = value.gather(1, at.expand(-1, -1, *value.shape[2:]))
        return found

    def with_later(self, layer: int, hidden: Tensor) -> Tensor:
        """Add the features that wait for a layer to the states that enter it, before its stages.

        They go through what shortened the states on their way to it.
        """
        features = self.later.get(layer)
        if features is None:
            return hidden
        for number in range(layer):
            for step in self.entered[number].steps:
                features = step(features)
        return hidden + features.to(hidden.device, hidden.dtype)

    # Shortening ------------------------------------------------------------------------------

    def take(self, chosen: list[tuple[ImageState, Selection]]) -> Step:
        """Shorten the sequence to what was chosen of each image.

        An image of which nothing is left takes its protected tokens with it. The row's last token
        stays in any case.

        Args:
            chosen: images and their selections (of one row each); images that are not named keep
                all that they have.

        Returns:
            What gathers hidden states, and writes merged features into their slots.
        """
        leaving = torch.zeros_like(self.table.valid)
        order: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.batch)]
        changed = False
        merges: list[tuple[ImageState, Tensor, Selection]] = []
        for image, given in chosen:
            selection = image.with_query(given)
            index = selection.index[0].to(image.slots.device)
            row, old = image.layout.row, image.slots
            leaving[row, old] = True
            kept = old[index]
            # Slots stay in the selection's order: one whose token lies before its predecessor's (a
            # merged token appended at the end) sorts with the predecessor.
            order[row].append((kept, kept.cummax(0).values if len(kept) else kept))
            if selection.merges:
                merges.append((image, old, selection))
                changed = changed or bool((index.diff() < 0).any())
            gone = len(old) - len(kept)
            if len(old) and not len(kept):
                leaving[row, image.fixed] = True
                self.alive[row] -= len(image.fixed)
                image.fixed = image.fixed[:0]
                changed = True
            changed = changed or gone > 0
            self.visual[row] -= gone
            self.alive[row] -= gone
            image.taken(selection, kept)
        rel = self._shorten(self._surviving(order, leaving) if changed else None)
        writes = [(image.layout.row, old, sel, image.slots) for image, old, sel in merges]

        def step(hidden: Tensor) -> Tensor:
            out = ops.take_rows(hidden, rel.to(hidden.device))
            for row, old, selection, new in writes:
                merged = selection.reduce(hidden[row, old.to(hidden.device)][None])
                out[row, new.to(out.device)] = merged[0]
            return out

        return step

    def _surviving(self, order: list[list[tuple[Tensor, Tensor]]], leaving: Tensor) -> list[Tensor]:
        """Slots of every sample after a stage.

        Args:
            order: for every sample, (slots, sort keys) of what replaces the tokens that leave.
            leaving: current slots that are not kept as they are, ``[B, P]`` bool.
        """
        rows = []
        keep = self.table.valid & ~leaving
        for number in range(self.batch):
            slots = keep[number].nonzero()[:, 0]
            parts, keys = [slots], [slots]
            for chosen, key in order[number]:
                parts.append(chosen)
                keys.append(key)
            joined = torch.cat(parts)
            rows.append(joined[torch.cat(keys).argsort(stable=True)])
        return rows

    def _shorten(self, rows: list[Tensor] | None) -> Tensor:
        """Replace the current table by the slots ``rows`` of it, one index tensor per sample.

        ``None`` keeps every slot (through the same gather). Updates the slots of every image and
        returns the slots to gather, ``[B, P']``.
        """
        old = self.table
        if rows is None:
            rel = torch.arange(old.num_slots, device=self.device).expand(self.batch, -1)
            real = torch.ones_like(rel, dtype=torch.bool)
        else:
            rel, real = assemble(rows, self.pad_side)
        self.table = old.gather(rel, real)
        self.rel = self.rel.gather(1, rel)
        place = torch.full_like(old.index, -1)
        place = torch.cat([place, place[:, :1]], dim=1)
        target = torch.where(real, rel, old.num_slots)
        place = place.scatter(
            1, target, torch.arange(rel.shape[1], device=rel.device).expand_as(rel)
        )
        for image in self.images:
            row = place[image.layout.row]
            image.slots, image.fixed = row[image.slots], row[image.fixed]
        return rel

    # The end ---------------------------------------------------------------------------------

    def differs(self, layer: int) -> bool:
        """Whether ``layer`` needs a mask or positions of its own."""
        return self.table is not self.first or self.ledger(layer) is not self.ledger(0)

    def enter(self, layer: int, steps: list[Step], changed: dict[str, Any]) -> None:
        """Note what ``layer`` works on."""
        self.entered[layer] = Entered(self.table, steps, changed)
        if self.images:
            self.trace.tokens_per_layer.append(list(self.visual))
            self.trace.sequence_per_layer.append(list(self.alive))
            before = stored_length(self.cache, layer)
            self.trace.cached_per_layer.append([before] * self.batch)
            self.trace.stored_per_layer.append([before + self.table.num_slots] * self.batch)

    def table_at(self, layer: int) -> SlotTable:
        """The slots that leave ``layer`` (-1: that enter the first), or the last ones."""
        if layer < 0:
            return self.first
        return self.entered[layer].table if layer in self.entered else self.table

    def close(self, cache: Any) -> Trace | None:
        """Give the cache its ledgers; returns the trace if the call held images."""
        if cache is not None and (
            self.images or any(isinstance(x, SlotLayer) for x in cache.layers)
        ):
            window = self.adapter.window if self.masks is not None else _no_window
            adopt(cache, self._next_ledger, window)
        return self._finished() if self.images else None

    def _finished(self) -> Trace:
        """The trace: counts by row instead of by layer, and what was kept."""
        trace = self.trace
        for name in (
            "tokens_per_layer",
            "sequence_per_layer",
            "stored_per_layer",
            "cached_per_layer",
        ):
            by_layer = getattr(trace, name)
            setattr(trace, name, [list(row) for row in zip(*by_layer, strict=True)])
        for image in self.images:
            picture = image.layout.picture
            tokens, size, chosen = image.kept()
            trace.kept.append(tokens)
            trace.sizes.append(size)
            trace.chosen.append(chosen)
            trace.all_pos.append(picture.pos)
            trace.pos.append(picture.pos[tokens.to(picture.pos.device)])
            trace.num_tokens.append(len(picture.pos))
            trace.image_rows.append(image.layout.row)
            trace.grids.append(picture.grids)
        trace.index = self.table.places()
        return trace

    def _next_ledger(self, layer: int) -> Ledger:
        """What the cache of ``layer`` holds after this forward."""
        table = self.table_at(layer)
        old = self.ledger(layer)
        key = ("next", old, table)
        if key not in self._memo:
            lost = torch.zeros(self.batch, dtype=torch.long, device=self.device)
            if table.shortened or table.padded:
                lost = self.first_valid.sum(1) - table.valid.sum(1)
            start = old or Ledger.empty(self.owner, table)
            self._memo[key] = start.appended(table, start.shift + lost.to(start.shift.device))
        return self._memo[key]


def _no_window(layer: int) -> int | None:
    return None


def _read_mask(
    mask: Any, seen: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of a call in two dimensions, or in four."""
    if isinstance(mask, dict) or (mask is not None and not isinstance(mask, Tensor)):
        raise UnsupportedModel(
            f"An attention mask of type {type(mask).__name__} was prepared outside the model; "
            f"visprune takes 2-D padding masks and 4-D masks."
        )
    if mask is None:
        return None, None
    if mask.dim() == 4:
        return None, mask
    if mask.shape[-1] != seen + length:
        raise ConfigError(
            f"The attention mask covers {mask.shape[-1]} tokens; the model has seen {seen} "
            f"(dropped ones count) and gets {length} new ones. Pass a mask of {seen + length}, or "
            f"none."
        )
    return mask.to(device=device, dtype=torch.bool), None
