# SPDX-License-Identifier: Apache-2.0
"""A reduction inside the image encoder of a vision-language model, and what follows from it.

The encoder works on the tokens that are left, and so does a projector that maps them one by one.
Behind it every patch gets the value of its slot, so that what follows (joining blocks of patches,
pooling frames, packing tiles, merging into the text) sees the grid that it expects. Of tokens that
are now made of the same slots all but one leave the sequence, before the first decoder layer.
Where a method brings its patches back, they are there behind the layer that is read, and all go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import EncoderAdapter
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import Picture
from visprune.core.method import PruningMethod
from visprune.core.selection import Selection
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.choose import Observer
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.images import Step
from visprune.machine.encoder.layer import install
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
        if self.adapter.whole_from == "encoder":
            self._handles.append(self.adapter.tower.register_forward_hook(self._restore))
        else:
            self._handles.append(self.adapter.projector.register_forward_hook(self._expand))
        install(self.reducer)

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reducer.remove()

    def _restore(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Behind the encoder: the value of its slot for every patch."""
        self._whole()
        return self._encoder.whole(self.reducer, output)

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

    def mark(self, pictures: list[Picture], given: Mapping[str, Any]) -> None:
        """Note in every picture which of its tokens stand for what is left of it.

        Args:
            pictures: those just encoded.
            given: what was encoded, and how.
        """
        self._refuse_other_layer(given.get("vision_feature_layer"))
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
            if source.dim() == 1:
                picture.alive = _one_of_each(slot[source], stands.flatten()[source])
                picture.size = sizes.flatten()[slot[source][picture.alive]]
                continue
            weight = None if picture.weight is None else picture.weight.to(dest.device)
            made = _made_of(slot[source], weight)
            if bool((made < 0).any()):
                raise UnsupportedModel(
                    f"{self.method.name} drops patches inside the image encoder, and tokens of "
                    f"this {picture.kind} are made of several patches each (a large picture or a "
                    f"frame is scaled down behind the encoder): one that was dropped has no value. "
                    f"Take a method that merges (tome, pitome), or a picture that is not scaled."
                )
            picture.alive, picture.size = _one_of_alike(made)

    def _refuse_other_layer(self, layer: Any) -> None:
        """The tokens of a call that reads another layer would not be those that are left."""
        own = getattr(self.adapter.config, "vision_feature_layer", None)
        if layer is not None and layer != own:
            raise ConfigError(
                f"This call reads encoder layer {layer} (vision_feature_layer); {self.method.name} "
                f"acts on a model that reads {own}. Leave it out, or change it in the config "
                f"before visprune.prune."
            )

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
                                 "after": after, "encoder": self.counts()})  # fmt: skip
        each = selection_macs(self._encoder, self.method, self.plan, self._encoder.default_grid())
        for image in fwd.images:
            seen = sum(frames for frames, _, _ in image.layout.picture.grids)
            fwd.trace.spend(image.layout.row, seen * each)
        return step

    def counts(self) -> list[tuple[int, int]]:
        """Patches of one encoder picture that enter each layer, and that leave its attention."""
        total = math.prod(self._encoder.default_grid())
        return self.plan.counts(total, len(self._encoder.layers))

    def leaving(self, layer: int) -> int:
        """Patches of one encoder picture that leave a layer."""
        return self.plan.leaving(math.prod(self._encoder.default_grid()), layer)


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


def _made_of(slot: Tensor, weight: Tensor | None) -> Tensor:
    """What tokens are made of, in rows that are alike where tokens are.

    Args:
        slot: of the patches of each token, -1 where one was dropped, ``[N, m]``.
        weight: what part of the token each is, ``[N, m]``; ``None``: they are joined in order.

    Returns:
        ``[N, m]``, or with parts ``[N, 2 m]``, float64; negative where a patch is missing.
    """
    if weight is None:
        return slot.double()
    first = slot.gather(1, weight.argmax(1, keepdim=True))
    slot = torch.where(weight > 0, slot, first)  # what is no part of it does not tell it apart
    alike = (slot == first).all(1, keepdim=True)  # parts of one slot sum up to all of it
    return torch.cat([slot.double(), weight.double().masked_fill(alike, 0.0)], dim=1)


def _one_of_alike(made: Tensor) -> tuple[Tensor, Tensor]:
    """The first of tokens that are made of the same, and how many those are.

    Args:
        made: see :func:`_made_of`.

    Returns:
        Indices in rising order, ``[K]``, and counts ``[K]``, float32.
    """
    kind, count = made.unique(dim=0, return_inverse=True, return_counts=True)[1:]
    place = torch.arange(len(made), device=made.device)
    first = place.new_full((len(count),), len(made)).scatter_reduce(0, kind, place, "amin")
    first, order = first.sort()
    return first, count[order].float()
