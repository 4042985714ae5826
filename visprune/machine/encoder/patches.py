# SPDX-License-Identifier: Apache-2.0
"""Leave patches out before the image encoder of a vision-language model, which gets shorter.

The method chooses from the pixels of each block of patches that becomes one token. The encoder is
given what is left, with its places. Behind it every block has a row again, so that the model's own
splitting and its merging into the text see the numbers that they expect; what was left out leaves
the sequence before the first decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.packed_tower import Cut, PackedTower
from visprune.backbones.vlm.picture import Picture, grid
from visprune.core.budget import Stage
from visprune.core.method import Context, PruningMethod
from visprune.core.selection import Selection
from visprune.core.threads import PerThread
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError
from visprune.machine.choose import Observer, choose
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.images import Step


class _Current(PerThread):
    """What the hooks of one encoding hand to each other.

    Attributes:
        keep: which blocks of each picture stay, ``[N]``, while the encoder runs without the rest.
        chosen: the selection of each picture that was encoded last.
        cut: what the encoder was given.
    """

    keep: list[Tensor] | None = None
    chosen: list[Selection] | None = None
    cut: Cut | None = None


class PatchReduction:
    """The stage of one run before the encoder.

    Args:
        adapter: the model family, with a packed encoder.
        method: the method.
        stage: its stage there, with its number.
        observers: whom to tell of every choice; read at each.
    """

    reducer = None

    def __init__(
        self,
        adapter: VLMAdapter,
        method: PruningMethod,
        stage: tuple[int, Stage],
        observers: Sequence[Observer] = (),
    ) -> None:
        assert adapter.packed_tower is not None, "the plan was refused where there is none"
        self.adapter, self.method, self.observers = adapter, method, observers
        self.packed: PackedTower = adapter.packed_tower
        self.number, self.stage = stage
        self._current = _Current()
        self._handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on."""
        tower = self.packed.tower
        self._handles.append(tower.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(tower.register_forward_hook(self._after))

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable
    def _before(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the encoder: choose, and give it what is left; all of it changes nothing."""
        current = self._current
        pixels, grids, given = self.packed.bind(args, kwargs)
        current.chosen = self._choose(pixels, grids)
        keep = [_kept(selection) for selection in current.chosen]
        cut = self.packed.cut(pixels, grids, given, keep)
        current.cut, current.keep = cut, None
        if len(cut.pixels) == len(pixels):
            return None
        current.keep = keep
        return (cut.pixels, grids), cut.arguments

    @torch.compiler.disable
    def _after(self, tower: nn.Module, args: Any, output: Any) -> Any:
        """Behind it: a row for every block."""
        keep, self._current.keep = self._current.keep, None
        return None if keep is None else self.packed.whole(output, keep)

    @torch.no_grad()
    def _choose(self, pixels: Tensor, grids: Tensor) -> list[Selection]:
        """The selection of each picture, ``[1, N]``."""
        found, merge = [], self.packed.merge
        each = zip(self.packed.blocks(pixels, grids), grids.tolist(), strict=True)
        for blocks, (t, h, w) in each:
            tokens = VisualTokens(
                features=blocks[None],
                size=torch.ones(1, len(blocks), device=blocks.device),
                pos=grid(t, h // merge, w // merge)[None],
                kind="image" if t == 1 else "video",
            )
            context = Context(stage=self.number, original=len(blocks))
            found.append(choose(self.method, self.stage, tokens, context, self.observers))
        return found

    def mark(self, pictures: list[Picture], given: Mapping[str, Any]) -> None:
        """Note in every picture which of its tokens are left, and what was encoded of it."""
        chosen, cut = self._current.chosen, self._current.cut
        if chosen is None or cut is None or len(chosen) != len(pictures):
            raise ConfigError(
                f"{self.method.name} chose from {len(chosen or ())} pictures, and "
                f"{len(pictures)} were encoded. Pass pixels."
            )
        self._current.chosen = self._current.cut = None
        for number, (picture, selection) in enumerate(zip(pictures, chosen, strict=True)):
            picture.alive = _kept(selection).nonzero()[:, 0]
            picture.size = torch.ones(len(picture.alive), device=picture.alive.device)
            picture.encoded = cut.frames[number], cut.windows[number]
            picture.projected = sum(cut.frames[number]) // self.packed.merge**2
            picture.spent = selection.macs

    def start(self, fwd: Forward) -> Step:
        """Let what was left out leave the sequence; returns what shortens it."""
        before = [len(image.tokens) for image in fwd.images]
        chosen = []
        for image in fwd.images:
            picture = image.layout.picture
            if picture.alive is None:
                raise ConfigError(
                    f"{self.method.name} acts before the vision encoder, and these features were "
                    f"encoded without it. Encode them inside the run."
                )
            alive = picture.alive.to(image.slots.device)
            chosen.append((image, Selection.keep(alive[None], len(image.tokens))))
            fwd.trace.spend(image.layout.row, picture.spent)
        step = fwd.take(chosen)
        fwd.trace.stages.append({"site": str(self.stage.site), "before": before, "clamped": [],
                                 "after": [len(image.tokens) for image in fwd.images]})  # fmt: skip
        return step


def _kept(selection: Selection) -> Tensor:
    """Which blocks of one picture a selection keeps, ``[N]`` bool.

    Raises:
        ConfigError: it merges, or keeps none.
    """
    if selection.merges or not selection.num_slots:
        raise ConfigError(
            "Before the encoder a method keeps patches as they are, at least one of a picture."
        )
    kept = torch.zeros(selection.num_tokens, dtype=torch.bool, device=selection.index.device)
    kept[selection.index[0]] = True
    return kept
