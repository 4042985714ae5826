# SPDX-License-Identifier: Apache-2.0
"""What each layer is given in one call of the language model, and what is noted of the call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import (
    Ledger,
    Owner,
    SlotLayer,
    adopt,
    joined_bias,
    ledger_of,
    stored_length,
)
from visprune.backbones.hf.masks import biased_mask, gather_mask, slot_mask, window_mask
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout
from visprune.core.signals.base import Signal
from visprune.core.slots import SlotTable, gather_sequence
from visprune.core.trace import Trace
from visprune.errors import UnsupportedModel
from visprune.machine.decoder.call import Call
from visprune.machine.decoder.images import Entered, Step


class Forward(Call):
    """A call on its way through the layers: masks and positions of each, and the trace.

    Args:
        adapter, owner, layouts, kwargs, compact, prompt: see :class:`Call`.
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
        super().__init__(adapter, owner, layouts, kwargs, compact=compact, prompt=prompt)
        self.masks = masks
        self.trace = Trace(positions="compact" if compact else "original")
        self.entered: dict[int, Entered] = {}
        self.signals: dict[Signal, Tensor] = {}
        self.read_at: dict[Signal, SlotTable] = {}
        self.later: dict[int, Tensor] = {}
        self.looks: Any = None  # what an eviction has seen so far
        self.stored: tuple[int, Tensor] | None = None
        self.ids: Tensor | None = None  # of the input, where the core was given them
        self.ahead = False  # a pass that is made to look ahead: no stage runs in it

    def first_pass(self) -> Forward:
        """The call as it is now, to run its first layers before the call itself does.

        It reads a copy of the cache, which is thrown away, and notes nothing.
        """
        first = copy.copy(self)
        first._memo, first.trace, first.entered = {}, Trace(positions=self.trace.positions), {}
        first.ahead = True
        first.cache = copy.deepcopy(self.cache) if self.seen else None
        first.start_layers()
        return first

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
            if self.weighed(layer):
                return True
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

    def arguments(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the decoder is called with for the sequence as it is now.

        Args:
            hidden: the embedded sequence, ``[B, P, D]``.
            kwargs: what the call was given.
        """
        mask: Any = None if self.masks is not None else self.model_mask()
        if self.masks is not None and self.adapter.takes_masks:
            mask = dict.fromkeys(self.masks)  # layers get theirs one by one
        new = dict(kwargs, inputs_embeds=hidden, attention_mask=mask)
        by_token = {name: kwargs.get(name) for name in self.adapter.by_token}
        new.update(self.by_token(by_token, self.table.index))
        if self.images or (self.compact and self.ledger(0) is not None):
            new["position_ids"] = self.table_positions(self.table, 0)
        return new

    def layer_mask(self, layer: int, hidden: Tensor) -> Any:
        """The mask of a layer whose slots differ from the first layer's."""
        if layer in self.adapter.recurrent:
            return self._there()
        table, ledger = self.table, self.ledger(layer)
        key = ("mask", self.adapter.kind_of(layer), table, ledger, hidden.device)
        if key not in self._memo:
            if self.masks is not None and not self._plain(layer):
                mask = self._by_place(layer, hidden.dtype)
            elif self.mask4d is not None:
                mask = self.cut(layer, table)
            else:
                stored = 0 if ledger is None else ledger.index.shape[1]
                mask = slot_mask(
                    self.adapter.text_config,
                    hidden[:, :1].expand(-1, table.num_slots, -1),
                    self.visible(layer, table),
                    stored,
                )
            bias = joined_bias(ledger, table)
            if bias is not None:
                bias = bias.to(hidden.device, hidden.dtype)
                mask = biased_mask(mask, bias, table.num_slots)
            self._memo[key] = mask
        return self._memo[key]

    def keep_last(self, count: int, given: dict[str, Any]) -> None:
        """Cut what a layer is given for all slots to its last queries, in place."""
        for name in ("attention_mask", "position_embeddings"):
            value = given.get(name)
            if isinstance(value, Tensor):
                given[name] = value[..., -count:, :]
            elif value is not None:
                given[name] = tuple(part[..., -count:, :] for part in value)

    def _there(self) -> Tensor | None:
        """Which slots a recurrent layer takes in, ``[B, P]``; ``None``: all.

        What is left out comes before a row's first token, where the state is still empty.
        """
        table = self.table
        return table.valid if table.padded and table.num_slots > 1 else None

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
        # A kernel that is given no mask for one query that sees all computes other last bits; as in
        # transformers, none is given as long as no window is full.
        window = self.adapter.window(layer)
        whole = window is None or self.seen + table.num_slots < window
        if not eager and table.num_slots == 1 and whole and bool(mask.all()):
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
        bias = joined_bias(self.ledger(layer), self.table)
        if own is not None:
            own = own.to(at.device)
            wanted = at[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
            own = own.gather(2, wanted)
        else:
            valid = self.visible(layer, self.table)
            own = None if valid is None else valid[:, None, None].to(at.device)
        if bias is None:
            return own
        bias = bias.to(at.device)
        everything = torch.ones(1, 1, 1, bias.shape[1], dtype=torch.bool, device=at.device)
        return biased_mask(everything if own is None else own, bias, at.shape[1])

    def table_positions(self, table: SlotTable, layer: int) -> Tensor:
        """Position ids of the slots of ``table``."""
        if not self.compact:
            return gather_sequence(self.full_positions(), table.index, -1)
        ledger = self.ledger(layer)
        if not table.shortened:  # as at every decoded token
            ids = self.full_positions()
            return ids if ledger is None else ids - ledger.shift[:, None].to(ids.device)
        # Ids close up in slot order, also where a merged slot stands behind its own token's place.
        end = -1 if self.pad_side == "left" else self.length
        index = torch.where(table.real, table.index, end).sort(dim=1).values
        index = index.clamp(0, self.length - 1)
        ids = gather_sequence(self.full_positions(), index, -1)
        gone = self.first_valid & ~table.kept()
        before = torch.cumsum(gone.long(), dim=1) - gone.long()
        ids = ids - before.gather(1, index).to(ids.device)
        return ids if ledger is None else ids - ledger.shift[:, None].to(ids.device)

    def rotary(self, layer: int, hidden: Tensor, given: Any) -> Any:
        """Position embeddings of a layer whose slots differ from the first layer's.

        Layers of one kind (full, sliding-window) share theirs; those of another kind have another
        rotary embedding.
        """
        ledger, kind = self.ledger(layer), self.adapter.rope_of(layer)
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

    def slot_ids(self) -> Tensor | None:
        """Ids of the tokens in the current slots, ``[B, P]``."""
        if self.ids is None or self.ids.shape[1] != self.length:
            return None
        return self.ids.gather(1, self.table.index.to(self.ids.device))

    @property
    def answers(self) -> bool:
        """Whether this call is one generated token behind a prompt that a run wrote."""
        if self.images or self.length != 1 or not self.seen:
            return False
        return ledger_of(self.cache, self.adapter.keeper(0)) is not None

    def thin(self, layer: int, stay: Tensor) -> None:
        """Let ``layer`` and later ones store the new token of the rows ``stay`` ``[B]`` alone."""
        if not bool(stay.all()):
            self.stored = layer, stay

    # The end ---------------------------------------------------------------------------------

    def differs(self, layer: int) -> bool:
        """Whether ``layer`` needs a mask or positions of its own."""
        other = self.table is not self.first or self.ledger(layer) is not self.ledger(0)
        return other or self.weighed(layer)

    def weighed(self, layer: int) -> bool:
        """Whether attention of a layer adds a bias to the scores of some slots."""
        ledger = self.ledger(layer)
        return self.table.bias is not None or (ledger is not None and ledger.bias is not None)

    def enter(self, layer: int, steps: list[Step], changed: dict[str, Any]) -> None:
        """Note what ``layer`` works on."""
        self.entered[layer] = Entered(self.table, steps, changed)
        if self.images:
            self.trace.tokens_per_layer.append(list(self.visual))
            self.trace.sequence_per_layer.append(list(self.alive))
            before = stored_length(self.cache, layer)
            keeps = layer not in self.adapter.recurrent
            after = before + self.table.num_slots if keeps else 0
            self.trace.cached_per_layer.append([before] * self.batch)
            self.trace.stored_per_layer.append([after] * self.batch)

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
            windows = self.adapter.window if self.masks is not None else None
            self._forget(cache)
            adopt(cache, self._next_ledger, windows)
        return self._finished() if self.images else None

    def _forget(self, cache: Any) -> None:
        """Take a token that no row stores out of the layers that do not."""
        if self.stored is None or bool(self.stored[1].any()):
            return
        for entry in cache.layers[self.stored[0] :]:
            if isinstance(entry, SlotLayer):
                entry.forget_last(self.table.num_slots)

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
            trace.placed.append(picture.placed)
            trace.encoded.append(picture.encoded)
            trace.projected.append(picture.projected)
        trace.index = self.table.places()
        return trace

    def _next_ledger(self, layer: int) -> Ledger:
        """What the cache of ``layer`` holds after this forward."""
        table = self.table_at(layer)
        old = self.ledger(layer)
        thin = self.stored is not None and layer >= self.stored[0]
        key = ("next", old, table, thin)
        if key not in self._memo:
            start = old or Ledger.empty(self.owner, table)
            shift = start.shift
            if table.shortened or table.padded:
                lost = self.first_valid.sum(1) - table.valid.sum(1)
                shift = shift + lost.to(shift.device)
            if thin and self.stored is not None:
                self._memo[key] = start.thinned(table, shift, self.stored[1])
            else:
                self._memo[key] = start.appended(table, shift)
        return self._memo[key]
