# SPDX-License-Identifier: Apache-2.0
"""One call of the language model under a run: its slots, what is cached before them, its pictures.

A :class:`Call` is built whole from the arguments of the call, belongs to that call alone, and gets
shorter here and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from visprune import ops
from visprune.backbones.hf.cache import Ledger, Owner, cache_of, ledger_of
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout
from visprune.core.selection import Selection
from visprune.core.slots import SlotTable, assemble, in_order
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.decoder.images import ImageState, Step


class Call:
    """The sequence of one call of the language model, as it gets shorter.

    Args:
        adapter: the model family.
        owner: the run, for the caches that it writes.
        layouts: the images of this call, in order.
        kwargs: the arguments of the call; ``inputs_embeds`` is among them.
        compact: whether position ids close up over dropped tokens.
        prompt: tokens of the prompt, an answer behind them not counted: one number, or one per row
            ``[B]``, counted in columns from the beginning of the cache; ``None``: all.

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
    ) -> None:
        self.adapter, self.owner, self.compact = adapter, owner, compact
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
        self._check_state()
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

    @property
    def first_valid(self) -> Tensor:
        """Validity of the input tokens ``[B, S]``."""
        if self.mask2d is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        return self.mask2d[:, self.seen :]

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
        found = ledger_of(self.cache, self.adapter.keeper(layer))
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
            self._memo[key] = ledger.hiding(self.mask2d)
        return self._memo[key]

    # Shortening ------------------------------------------------------------------------------

    def take(self, chosen: list[tuple[ImageState, Selection]], *, weigh: bool = False) -> Step:
        """Shorten the sequence to what was chosen of each image.

        An image of which nothing is left takes its protected tokens with it. The row's last token
        stays in any case.

        Args:
            chosen: images and their selections (of one row each); images that are not named keep
                all that they have.
            weigh: from here on, attention adds the logarithm of what a visual token stands for.

        Returns:
            What gathers hidden states, and writes merged features into their slots.
        """
        leaving = torch.zeros_like(self.table.valid)
        order: list[list[Tensor]] = [[] for _ in range(self.batch)]
        changed = False
        merges: list[tuple[ImageState, Tensor, Selection]] = []
        for image, given in chosen:
            selection = image.with_query(given)
            index = selection.index[0].to(image.slots.device)
            row, old = image.layout.row, image.slots
            leaving[row, old] = True
            kept = old[index]
            order[row].append(kept)
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
        if weigh:
            self._weigh()
        writes = [(image.layout.row, old, sel, image.slots) for image, old, sel in merges]

        def step(hidden: Tensor) -> Tensor:
            out = ops.take_rows(hidden, rel.to(hidden.device))
            for row, old, selection, new in writes:
                merged = selection.reduce(hidden[row, old.to(hidden.device)][None])
                out[row, new.to(out.device)] = merged[0]
            return out

        return step

    def _weigh(self) -> None:
        """Let attention add the logarithm of the sizes of the slots that are left."""
        bias = torch.zeros(self.table.index.shape, device=self.device)
        for image in self.images:
            bias[image.layout.row, image.slots] = image.size.to(bias).log()
        self.table = replace(self.table, bias=bias if bool(bias.any()) else None)

    def _check_state(self) -> None:
        """Refuse a pruned cache whose recurrent layers went on behind a row's last token."""
        if not self.seen or not self.adapter.recurrent:
            return
        ledger = ledger_of(self.cache, self.adapter.keeper(0))
        if ledger is not None and ledger.padded and not bool(ledger.valid[:, -1].all()):
            raise UnsupportedModel(
                f"Padding stands behind the last token of some rows of the cache, and the state of "
                f"the recurrent layers of {self.adapter.config.model_type} has gone through it. "
                f"Pad prompts on the left (processor.tokenizer.padding_side = 'left')."
            )

    def _check_filled(self) -> None:
        """Refuse padding that the state of recurrent layers would go through."""
        if self.seen or self.adapter.padding_counts:
            why = "of a later turn" if self.seen else "of its bias"
            raise UnsupportedModel(
                f"The rows of this batch keep different numbers of tokens, and what evens them out "
                f"would pass through the state of the recurrent layers of "
                f"{self.adapter.config.model_type}, because {why}. Give the rows one by one."
            )

    def _surviving(self, order: list[list[Tensor]], leaving: Tensor) -> list[Tensor]:
        """Slots of every sample after a stage.

        Args:
            order: for every sample, what replaces the tokens that leave, in their order.
            leaving: current slots that are not kept as they are, ``[B, P]`` bool.
        """
        rows = []
        keep = self.table.valid & ~leaving
        for number in range(self.batch):
            staying = keep[number].nonzero()[:, 0]
            joined = torch.cat([staying, *order[number]])
            rows.append(joined[in_order(staying, order[number])])
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
        if self.table.filled and self.adapter.recurrent:
            self._check_filled()
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
