# SPDX-License-Identifier: Apache-2.0
"""A reduction inside the image encoder of a vision-language model, and what follows from it.

The encoder and the projector work on the tokens that are left. Behind the projector every patch
gets the value of its slot, so that the model's own packing of tiles and its merging into the text
see the grid that they expect; then all but one token of each slot leave the sequence, before the
first decoder layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import EncoderAdapter
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import Picture
from visprune.core.method import PruningMethod
from visprune.core.selection import Selection
from visprune.errors import ConfigError
from visprune.machine.choose import Observer
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.images import Step
from visprune.machine.encoder.plan import EncoderPlan
from visprune.machine.encoder.price import selection_macs
from visprune.machine.encoder.reducer import EncoderReducer


class EncoderReduction:
    """The vision stages of one run.

    Args:
        adapter: the model family, with an encoder.
        method: the method.
        plan: its stages inside the encoder.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        method: PruningMethod,
        plan: EncoderPlan,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.adapter, self.method, self.plan = adapter, method, plan
        self.learned = method.build_learned(adapter.spec)
        self.reducer = EncoderReducer(self._encoder, method, plan, self.learned, observers)
        self._handles: list[Any] = []

    @property
    def _encoder(self) -> EncoderAdapter:
        encoder = self.adapter.encoder
        assert encoder is not None, "the plan was refused where there is none"
        return encoder

    def install(self) -> None:
        """Put the hooks on."""
        self.reducer.install()
        self._handles.append(self.adapter.projector.register_forward_hook(self._expand))

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reducer.remove()

    def _expand(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Behind the projector: the value of its slot for every patch, ``[P, N, D]``."""
        whole = self._whole()
        extra = output.shape[1] - whole.num_slots
        if extra not in (0, self._encoder.prefix):
            raise ConfigError(
                f"The projector was given {output.shape[1]} tokens of a picture; encoder layer "
                f"{self.adapter.encoder_end}, whose output the config says is read, leaves "
                f"{whole.num_slots}. Do not pass another vision_feature_layer."
            )
        return torch.cat([output[:, :extra], whole.expand(output[:, extra:])], dim=1)

    def _whole(self) -> Selection:
        latest = self.reducer.latest
        if latest is None or not latest.layers:
            raise ConfigError("The projector ran before the encoder; pass pixels.")
        return latest.composed(self.adapter.encoder_end)

    def mark(self, pictures: list[Picture]) -> None:
        """Note in every picture which of its tokens stand for what is left of it."""
        whole = self._whole()
        dest, sizes = whole.dest(), whole.size
        tiles, patches = dest.shape
        slot = torch.arange(tiles, device=dest.device)[:, None] * whole.num_slots + dest
        slot = torch.where(dest < 0, -1, slot).flatten()
        stands = torch.zeros(tiles, patches, dtype=torch.bool, device=dest.device)
        stands.scatter_(1, whole.index, True)
        for picture in pictures:
            if picture.source is None:
                raise ConfigError("The adapter does not say which patch each token comes from.")
            source = picture.source.to(dest.device)
            picture.alive = _one_of_each(slot[source], stands.flatten()[source])
            picture.size = sizes.flatten()[slot[source][picture.alive]]

    def start(self, fwd: Forward) -> Step:
        """Let all but one token of every slot leave the sequence; returns what shortens it."""
        before = [len(image.tokens) for image in fwd.images]
        chosen = []
        for image in fwd.images:
            picture = image.layout.picture
            if picture.alive is None or picture.size is None:
                raise ConfigError(
                    f"{self.method.name} acts inside the vision encoder, and these features were "
                    f"encoded without it. Encode them inside the run."
                )
            alive = picture.alive.to(image.slots.device)
            chosen.append((image, Selection.keep(alive[None], len(image.tokens))))
        step = fwd.take(chosen)
        for image in fwd.images:
            size = image.layout.picture.size
            if size is not None and len(size) == len(image.size):
                image.size = size.to(image.slots.device)
        after = [len(image.tokens) for image in fwd.images]
        sites = [
            str(stage.site)
            for n in range(len(self._encoder.layers))
            for _, stage in self.plan.at(n)
        ]
        fwd.trace.stages.append({"site": "; ".join(sites), "before": before, "clamped": [],
                                 "after": after})  # fmt: skip
        each = selection_macs(self._encoder, self.method, self.plan, self._encoder.default_grid())
        for image in fwd.images:
            fwd.trace.spend(image.layout.row, len(image.layout.picture.grids) * each)
        return step

    def counts(self) -> list[tuple[int, int]]:
        """Patches of one encoder picture that enter each layer, and that leave its attention."""
        total = math.prod(self._encoder.default_grid())
        return self.plan.counts(total, len(self._encoder.layers))


def _one_of_each(slot: Tensor, stands: Tensor) -> Tensor:
    """One token of every slot: the one it stands for, or where that was cut off, the first.

    Args:
        slot: of every token of a picture, -1 where it was dropped, ``[N]``.
        stands: whether the slot stands for this very token, ``[N]``.

    Returns:
        Indices in rising order.
    """
    order = (~stands).to(torch.int8).argsort(stable=True)  # those that stand for a slot first
    order = order[slot[order] >= 0]
    order = order[slot[order].argsort(stable=True)]
    first = torch.ones(len(order), dtype=torch.bool, device=slot.device)
    first[1:] = slot[order][1:] != slot[order][:-1]
    return order[first].sort().values
