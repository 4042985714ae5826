# SPDX-License-Identifier: Apache-2.0
"""PACT: prune by importance, then cluster what repeats (CVPR 2025, arXiv:2504.08966)."""

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
    VisualTokens,
)
from visprune.core.signals import DecoderSeen, DecoderSignal
from visprune.core.signals.base import DecoderLayer
from visprune.errors import ConfigError


@dataclass(frozen=True)
class VisualImportance(DecoderSignal):
    """Softmax of the mean visual query over the visual keys, mean over heads, ``[B, N]``.

    Before the rotary embedding, of the layer that the stage acts at; all pictures of a sample are
    one pool.
    """

    reads_values: ClassVar[bool] = False

    layer: DecoderLayer = "own"

    @property
    def unrotated(self) -> bool:
        """Before the rotary embedding."""
        return True

    def read(self, seen: DecoderSeen) -> Tensor:
        """One row of the map, for each head."""
        query, key = seen.attention()
        key = key[:, :, seen.stored :].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        visual = (seen.visual & seen.valid)[:, None].to(query.device)  # [B, 1, P]
        there = visual[..., None].to(query.dtype)
        mean = (query * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
        scores = (mean @ key.transpose(2, 3))[:, :, 0] * seen.scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.masked_fill(~visual, -torch.inf).softmax(-1).nan_to_num().mean(1)


@dataclass(frozen=True)
class OwnKeys(DecoderSignal):
    """Keys of the visual tokens in the layer that the stage acts at, ``[B, Hk, N, d]``."""

    reads_values: ClassVar[bool] = False
    token_dim: ClassVar[int | None] = -2

    layer: DecoderLayer = "own"

    def read(self, seen: DecoderSeen) -> Tensor:
        """Behind the rotary embedding."""
        return seen.attention()[1][:, :, seen.stored :]


@dataclass(frozen=True, kw_only=True)
class PACT(PruningMethod):
    """Drops unimportant visual tokens, and merges what is left where it repeats.

    A token's importance is :class:`VisualImportance` times the norm of its state; ``int(share n)``
    stay. These are clustered by the cosine distance of their keys (behind the rotary embedding): in
    falling density ``sum exp(-(d/2)^2)`` a token becomes a centre if it is farther than ``cutoff``
    from all centres so far; all others join the nearest one, as a plain mean, and a dropped token
    joins too where one is within ``recover`` times the cutoff. A centre keeps its place. So each
    picture keeps its own number of tokens.

    From the stage on, decoder layers add the logarithm of a cluster's size to its scores, as a key
    (proportional attention), for generated tokens too; kernels that take no such bias
    (FlashAttention) are refused.

    Args:
        share: what pruning keeps of a picture's tokens, in (0, 1].
        cutoff: distance of centres, 0.21 by default.
        recover: see above.
        layer: 0-based decoder layer on entering which the tokens are gone, or a fraction of the
            depth.
        prop_attn: whether attention weighs clusters by size; without, one counts as one token.
    """

    name: ClassVar[str] = "pact"

    share: float = 0.55
    cutoff: float = 0.21
    recover: float = 1.5
    layer: int | float = 4
    prop_attn: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if not (0.0 < self.share <= 1.0 and self.cutoff >= 0.0 and self.recover >= 1.0):
            raise ConfigError(
                f"pact takes share in (0, 1], cutoff of at least 0 and recover of at least 1; got "
                f"{self.share}, {self.cutoff} and {self.recover}."
            )

    @property
    def size_bias(self) -> bool:
        """Whether clusters weigh as much as the tokens in them."""
        return self.prop_attn

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder, which decides itself."""
        return (Stage(Site.decoder(self.layer), None, (VisualImportance(), OwnKeys())),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Prune, then cluster."""
        norm = torch.linalg.vector_norm(tokens.features, dim=-1, dtype=torch.float32)
        order = (ctx[VisualImportance()] * norm).argsort(dim=1, descending=True, stable=True)
        keep = max(1, int(self.share * tokens.num_tokens))
        stay = torch.zeros(norm.shape, dtype=torch.bool, device=norm.device)
        stay = stay.scatter(1, order[:, :keep], True)
        return cluster(ctx[OwnKeys()].transpose(1, 2).flatten(2), stay, self.cutoff, self.recover)

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines of the tokens that pruning keeps, and of the others to them."""
        return count * max(1, int(self.share * count)) * width


def cluster(keys: Tensor, stay: Tensor, cutoff: float, recover: float) -> Selection:
    """Clusters of the tokens that stay, with those of the others that are near a centre.

    Args:
        keys: ``[B, N, E]``.
        stay: what pruning left, bool ``[B, N]``.
        cutoff: distance of centres.
        recover: how many times as far a token may be that joins one.
    """
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    unit = torch.nn.functional.normalize(wide, dim=-1)
    found = []
    for image, left in zip(unit, stay, strict=True):
        kept = left.nonzero()[:, 0]
        dist = (1.0 - image[kept] @ image[kept].T).clamp(min=0.0).fill_diagonal_(0.0)
        density = (-(dist / 2).square()).exp().sum(-1)
        centers = kept[ops.separated(dist[None], density[None], cutoff)[0]]
        far = (1.0 - image @ image[centers].T).clamp(min=0.0)
        nearest, label = far.min(1)
        joins = nearest <= cutoff * recover
        label = label.scatter(0, centers, torch.arange(len(centers), device=label.device))
        joins = joins.scatter(0, centers, True)
        joins[centers] = False
        source = joins.nonzero()[:, 0]
        size = torch.ones(1, len(image), device=keys.device)
        found.append(Selection.mean(centers[None], source[None], label[source][None], size))
    return Selection.stack(found)
