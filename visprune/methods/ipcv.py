# SPDX-License-Identifier: Apache-2.0
"""IPCV: fewer patches inside the encoder, all of them behind it (2025, arXiv:2512.18747)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune import ops
from visprune.core import (
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    StepBudget,
    VisualTokens,
)
from visprune.core.numeric import is_number, is_whole
from visprune.core.signals import EncoderChange
from visprune.errors import BudgetError, ConfigError


@dataclass(frozen=True, kw_only=True)
class IPCV(PruningMethod):
    """Computes the later layers of an encoder on the patches that changed most; all come back.

    On entering a layer, ``int(keep_ratio * n)`` of a picture's n patches stay (at least one): those
    that the layer before moved farthest (Euclidean norm); ties keep the lower index. Each of the
    others gets its ``top_k`` nearest ones among those that stay, by Euclidean distance of what
    enters the layer, once for all later layers. Where the others are wanted again, each is what it
    was plus the mean movement of its neighbours since then: in the ``attention_stabilization``
    layers from there on, whose attention sees all patches while their MLP runs for those that stay,
    and behind the layer whose output the model reads. The language model is given ALL tokens: what
    is saved is the encoder's work; chain it with a method behind the encoder to shorten the prompt.
    A class token and other prefix tokens are never dropped, and are no neighbours.

    Defaults are those of the official scripts for InternVL2: layer 7 of 24 and three stabilized
    layers; for Qwen2-VL they have layer 3 of 32 and seven. Its encoder packs all pictures into one
    sequence, in which no token can leave here. Differences from the official code: neighbours are
    of the same picture (tile), and patches; there, of all tiles of a batch and the class token too,
    so that a picture's features depend on what it is encoded with. Layer 1 works (there the state
    before it is missing). Gradients flow; there, what left is detached.

    Args:
        keep_ratio: fraction of the patches that stay, in (0, 1].
        layer: on entering which the others leave: 0-based, at least 1, or a fraction of the depth.
        attention_stabilization: layers, from that one on, whose attention sees all patches, at
            least 0; on a shallow encoder, at most those that there are.
        top_k: neighbours that a patch follows, at least 1; of fewer that stay, all.
    """

    name: ClassVar[str] = "ipcv"
    gives_back: ClassVar[bool] = True

    keep_ratio: float = 0.35
    layer: int | float = 7 / 24
    attention_stabilization: int = 3
    top_k: int = 10

    def __post_init__(self) -> None:
        """Check all four."""
        super().__post_init__()
        if not (is_number(self.keep_ratio) and 0.0 < self.keep_ratio <= 1.0):
            raise BudgetError(
                f"keep_ratio is the fraction of patches that stay in the later layers, in (0, 1]; "
                f"got {self.keep_ratio!r}."
            )
        if not is_number(self.layer) or not (self.layer >= 1 or 0.0 < self.layer < 1.0):
            raise ConfigError(
                f"layer is where patches leave, by what the layer before has changed: 1 or more, "
                f"or a fraction of the depth in (0, 1); got {self.layer!r}."
            )
        for name, least in (("attention_stabilization", 0), ("top_k", 1)):
            count = getattr(self, name)
            if not is_whole(count) or count < least:
                raise ConfigError(f"{name} is a whole number of at least {least}, got {count!r}.")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage, whose patches come back."""
        budget = StepBudget(keep_ratio=self.keep_ratio, rounding="floor")
        needs, steady = (EncoderChange("own"),), self.attention_stabilization
        return (Stage(Site.encoder(self.layer), budget, needs, restores=steady),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The most changed; the others follow their likes among them."""
        chosen = Selection.top(ctx[EncoderChange("own")], ctx.num_keep)
        return chosen.returning(following(tokens.features, chosen.index, self.top_k))

    def macs(self, count: int, keep: int, width: int) -> int:
        """Distances, and the mean movement each time that patches come back."""
        times = 1 + self.attention_stabilization
        return (count - keep) * width * (keep + times * min(self.top_k, keep))


@dataclass(frozen=True)
class Following:
    """Patches that left, each of which follows its neighbours among those that stayed.

    Attributes:
        before: all patches as they were when these left, ``[B, N, D]``.
        kept: those that stayed, rising, ``[B, K]``.
        gone: the others, rising, ``[B, R]``.
        near: of each of those its neighbours, as places in ``kept``, ``[B, R, k]``.
    """

    before: Tensor
    kept: Tensor
    gone: Tensor
    near: Tensor

    def restore(self, kept: Tensor) -> Tensor:
        """See :class:`visprune.core.restoration.Restoration`."""
        wide = torch.promote_types(kept.dtype, torch.float32)
        moved = kept.to(wide) - ops.take_rows(self.before, self.kept).to(wide)
        mean = torch.zeros_like(moved[:, :1])
        for near in self.near.unbind(-1):  # one at a time: all at once are k times the patches
            mean = mean + ops.take_rows(moved, near) / self.near.shape[-1]
        back = ops.take_rows(self.before, self.gone).to(wide) + mean
        both = torch.cat([kept, back.to(kept.dtype)], dim=1)
        return ops.take_rows(both, torch.cat([self.kept, self.gone], dim=1).argsort(dim=1))


def following(x: Tensor, kept: Tensor, top_k: int) -> Following:
    """Which patches each of those that leave will follow.

    Args:
        x: all patches, ``[B, N, D]``.
        kept: those that stay, rising, ``[B, K]``.
        top_k: neighbours of each; of fewer that stay, all.
    """
    stay = torch.zeros(x.shape[:2], dtype=torch.int8, device=x.device).scatter(1, kept, 1)
    gone = stay.argsort(dim=1, stable=True)[:, : x.shape[1] - kept.shape[1]]
    states = x.detach()
    distance = ops.distances_to(ops.take_rows(states, gone), ops.take_rows(states, kept))
    near = distance.argsort(dim=-1, stable=True)[..., :top_k]
    return Following(x, kept, gone, near)
