# SPDX-License-Identifier: Apache-2.0
"""The state of one forward of a pruned decoder: which tokens stand where, at every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import (
    Ledger,
    Owner,
    SlotLayer,
    adopt,
    cache_of,
    ledger_of,
    stored_length,
)
from visprune.backbones.hf.masks import gather_mask, slot_mask
from visprune.backbones.vlm.base import ImageLayout, VLMAdapter
from visprune.core.slots import SlotTable, assemble, gather_sequence
from visprune.core.trace import Trace
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.decoder.images import Entered, ImageState, finished


class Forward:
    """One call of the language model under a run.

    Args:
        adapter: the model family.
        owner: the run, for the caches that it writes.
        images: the images of this call, in order.
        compact: whether position ids close up over dropped tokens.
    """

    def __init__(
        self, adapter: VLMAdapter, owner: Owner, images: list[ImageLayout], *, compact: bool
    ) -> None:
        self.adapter, self.owner, self.compact = adapter, owner, compact
        self.images = [ImageState.start(layout) for layout in images]
        self.trace = Trace(positions="compact" if compact else "original")
        self.attention: Tensor | None = None
        self.entered: dict[int, Entered] = {}
        self._memo: dict[Any, Any] = {}

    def open(self, kwargs: dict[str, Any]) -> None:
        """Read the arguments of the call.

        Raises:
            ConfigError: the attention mask does not cover the cached and the new tokens.
        """
        embeds: Tensor = kwargs["inputs_embeds"]
        self.batch, self.length = embeds.shape[:2]
        self.device = embeds.device
        self.cache = cache_of(kwargs)
        self.seen = int(self.cache.get_seq_length()) if self.cache is not None else 0
        self._read_mask(kwargs.get("attention_mask"))
        self.pad_side = "left"
        if self.table.padded and not bool(self.table.valid[:, -1].all()):
            self.pad_side = "right"
        self.start_layers()
        self.positions: Tensor | None = kwargs.get("position_ids")
        if self.images:
            self.alive = (
                self.table.valid.sum(1).tolist()
                if self.table.padded
                else [self.length] * self.batch
            )
            self.visual = [0] * self.batch
            for image in self.images:
                self.visual[image.layout.row] += len(image.tokens)

    def _read_mask(self, mask: Any) -> None:
        self.mask2d: Tensor | None = None
        self.mask4d: Tensor | None = None
        if isinstance(mask, dict) or (mask is not None and not isinstance(mask, Tensor)):
            raise UnsupportedModel(
                f"An attention mask of type {type(mask).__name__} was prepared outside the model; "
                f"visprune takes 2-D padding masks and 4-D masks."
            )
        if mask is not None and mask.dim() == 4:
            self.mask4d = mask
        elif mask is not None:
            if mask.shape[-1] != self.seen + self.length:
                raise ConfigError(
                    f"The attention mask covers {mask.shape[-1]} tokens; the model has seen "
                    f"{self.seen} (dropped ones count) and gets {self.length} new ones. Pass a "
                    f"mask of {self.seen + self.length}, or none."
                )
            self.mask2d = mask.to(device=self.device, dtype=torch.bool)
        new = None if self.mask2d is None else self.mask2d[:, self.seen :]
        self.table = SlotTable.identity(self.batch, self.length, new, self.device)

    def start_layers(self) -> None:
        """Take the current table as the one that the language model is called with."""
        self.first = self.table
        steps = torch.arange(self.table.num_slots, device=self.device)
        self.rel = steps.expand(self.batch, -1)

    def full_positions(self) -> Tensor:
        """Position ids of the input, as given or as the model would count them."""
        if self.positions is None:
            count = torch.arange(self.seen, self.seen + self.length, device=self.device)
            self.positions = count[None]
        return self.positions

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
        key = ("mask", table, ledger, hidden.device)
        if key not in self._memo:
            if self.mask4d is not None:
                mask = self.cut(layer, table)
            else:
                stored = stored_length(self.cache, layer)
                mask = slot_mask(
                    self.adapter.text_config, hidden, self.visible(layer, table), stored
                )
            self._memo[key] = mask
        return self._memo[key]

    def cut(self, layer: int, table: SlotTable) -> Tensor:
        """The user's 4-D mask, cut down to the slots of ``table`` at ``layer``."""
        ledger = self.ledger(layer)
        assert self.mask4d is not None, "only called with a 4-D mask"
        key, valid = table.index + self.seen, table.valid
        if ledger is not None:
            key = torch.cat([ledger.index, key], dim=1)
            valid = torch.cat([ledger.valid, valid], dim=1)
        return gather_mask(self.mask4d, table.index, key, valid)

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
        """Position embeddings of a layer whose slots differ from the first layer's."""
        ledger = self.ledger(layer)
        shifted = self.compact and ledger is not None and ledger is not self.ledger(0)
        if self.table is self.first and not shifted:
            return given
        key = ("rotary", self.table, ledger if shifted else None, hidden.device)
        if key not in self._memo:
            if self.compact:
                ids = self.table_positions(self.table, layer)
                made = self.adapter.language_model.rotary_emb(hidden, position_ids=ids)
            else:
                made = tuple(gather_sequence(part, self.rel, -2) for part in given)
            self._memo[key] = made
        return self._memo[key]

    # Shortening ------------------------------------------------------------------------------

    def shorten(self, rows: list[Tensor] | None) -> Tensor:
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

    def enter(
        self, layer: int, steps: list[Callable[[Tensor], Tensor]], changed: dict[str, Any]
    ) -> None:
        """Note what ``layer`` works on."""
        self.entered[layer] = Entered(self.table, steps, changed)
        if self.images:
            self.trace.tokens_per_layer.append(list(self.visual))
            self.trace.sequence_per_layer.append(list(self.alive))
            before = stored_length(self.cache, layer)
            self.trace.cached_per_layer.append([before] * self.batch)
            self.trace.stored_per_layer.append([before + self.table.num_slots] * self.batch)

    def close(self, cache: Any) -> Trace | None:
        """Give the cache its ledgers; returns the trace if the call held images."""
        if cache is not None and (
            self.images or any(isinstance(x, SlotLayer) for x in cache.layers)
        ):
            adopt(cache, self._next_ledger)
        if not self.images:
            return None
        return finished(self.trace, self.images)

    def _next_ledger(self, layer: int) -> Ledger:
        """What the cache of ``layer`` holds after this forward."""
        table = self.entered[layer].table if layer in self.entered else self.table
        old = self.ledger(layer)
        key = ("next", old, table)
        if key not in self._memo:
            lost = torch.zeros(self.batch, dtype=torch.long, device=self.device)
            if table.shortened or table.padded:
                lost = self.first_valid.sum(1) - table.valid.sum(1)
            start = old or Ledger.empty(self.owner, table)
            self._memo[key] = start.appended(table, start.shift + lost.to(start.shift.device))
        return self._memo[key]
