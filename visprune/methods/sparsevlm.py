# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: what the picture's own raters in the text look at (ICML 2025, arXiv:2410.04417)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visprune import ops
from visprune.core import (
    Budget,
    Context,
    ModelSpec,
    PositionRule,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import (
    AttentionRows,
    DecoderSeen,
    DecoderSignal,
    RotaryTables,
    Slots,
    TextSlots,
)
from visprune.errors import ConfigError
from visprune.methods._depths import increasing

# Tokens left at the three stages, of 576, by what the paper calls the number of tokens.
V1 = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
V2 = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
_HEADS = 14


@dataclass(frozen=True)
class Raters(DecoderSignal):
    """Which text behind the first picture rates its tokens, by input embeddings, bool ``[B, R]``.

    Those whose mean softmax over the text, from each visual token, is above the mean of all.
    """

    uses: ClassVar[Literal["attention", "states", "sequence", "input"]] = "input"
    token_dim: ClassVar[int | None] = None

    def read(self, seen: DecoderSeen) -> Tensor:
        """A softmax over the text for every visual token."""
        at = seen.queries("after_image").to(seen.hidden.device)
        wide = seen.hidden.to(torch.promote_types(seen.hidden.dtype, torch.float32))
        place = at.clamp(min=0)[..., None].expand(-1, -1, wide.shape[-1])
        scores = wide @ wide.gather(1, place).transpose(1, 2)  # [B, P, R]
        there = at >= 0
        share = scores.masked_fill(~there[:, None], -torch.inf).softmax(-1).nan_to_num()
        visual = (seen.visual & seen.valid).to(share)[..., None]
        rating = (share * visual).sum(1) / visual.sum(1).clamp(min=1)
        mean = rating.sum(1) / there.sum(1).clamp(min=1)
        return there & (rating > mean[:, None])


@dataclass(frozen=True, kw_only=True)
class SparseVLM(PruningMethod):
    """Keeps, at three depths, the tokens that the raters among the text attend to most.

    Raters are found once, by the embeddings that enter the decoder (:class:`Raters`). The score of
    a visual token is the mean over raters and heads of the attention that it got in the layer
    before. Version 1 recycles: of the P tokens that leave, the ``int(0.3 P) + 1`` best become
    ``int(m / 10) + 1`` means by density peaks, behind those kept, and position ids close up.
    Version 2 does not, keeps ids, divides attention by what the rotary embedding gives a pair of
    equal vectors at that distance (which passes zero: a score may change its sign), and takes the
    14 heads that look at the picture most.

    ``setting`` is the paper's number of tokens, which counts a stage as done in the layer that it
    only follows: with 576 tokens and 32 layers 192, 128, 96 and 64 are 206.5, 145.4, 114.1 and 82.2
    tokens a layer on average (version 2: 206.8, 144.1, 113.9, 81.8). Pictures of another size keep
    the same share. Stages stand behind layers 2, 6 and 15 of 32.

    Differences: the official code always drops one token at least, also where a stage asks for
    more than there are (``official=True``); here such a picture is left whole. It takes one picture
    alone and adds noise to densities.

    Args:
        setting: 192, 128, 96 or 64.
        version: 1 or 2.
        lists: tokens left at each stage, in place of a setting.
        adaptive: the paper's rule, which the code has not: each stage drops this factor times (what
            is left minus the rank of the raters' map) tokens of each picture.
        official: see above.
        layers: where the stages are: 0-based layers, at least 1, or fractions of the depth.
    """

    name: ClassVar[str] = "sparsevlm"
    default_positions: ClassVar[PositionRule] = "compact"

    setting: int = 192
    version: int = 1
    lists: tuple[int, ...] | None = None
    adaptive: float | None = None
    official: bool = False
    layers: tuple[int | float, ...] = (3 / 32, 7 / 32, 16 / 32)

    def __post_init__(self) -> None:
        """Check the setting."""
        super().__post_init__()
        object.__setattr__(self, "layers", increasing("sparsevlm", self.layers))
        if self.version not in (1, 2) or self.setting not in V1:
            raise ConfigError(
                f"sparsevlm takes setting 192, 128, 96 or 64 and version 1 or 2; got "
                f"{self.setting!r} and {self.version!r}. For other counts give lists."
            )
        if self.lists is not None:
            object.__setattr__(self, "lists", tuple(self.lists))
        lists = self.lists or V1[self.setting]
        if len(lists) != len(self.layers) or min(lists) < 1:
            raise ConfigError(
                f"lists are what the stages at {len(self.layers)} layers leave, each at least 1; "
                f"got {lists}."
            )
        if self.adaptive is not None and not self.adaptive >= 0.0:
            raise ConfigError(f"adaptive is a factor, at least 0; got {self.adaptive}.")
        if self.version == 2 and self.positions is None:
            object.__setattr__(self, "positions", "original")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage per layer, which decides itself."""
        needs: tuple[DecoderSignal, ...] = (Raters(), AttentionRows())
        if self.version == 2:
            needs = (*needs, RotaryTables(), Slots(), TextSlots())
        stages: dict[int, Stage] = {}
        for number, layer in enumerate(self.layers):
            at = Site.decoder(layer).resolve(spec.num_layers)
            # On a shallow model two stages may fall on one layer: the deeper one counts.
            stages[at] = Stage(Site.decoder(at), self._budget(number), needs)
        return tuple(stages.values())

    def _budget(self, number: int) -> Budget | None:
        """Tokens kept at a stage; what is recycled comes on top."""
        if self.adaptive is not None:
            return None
        if self.lists is not None:
            return Budget(num_keep=self.lists[number])
        table = V1 if self.version == 1 else V2
        return Budget(keep_ratio=table[self.setting][number] / 576)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Of each picture what its raters look at."""
        rows = ctx[AttentionRows()]  # [B, H, R, N]
        raters = ctx[Raters()].to(rows.device)
        if self.version == 2:
            rows = rows / self._gravity(ctx)[:, None]
        chosen = []
        for image in range(len(rows)):
            drawn = rows[image][:, raters[image]]
            if self.version == 2 and len(drawn) > _HEADS:
                drawn = drawn[drawn.sum((1, 2)).topk(_HEADS).indices]
            rated = drawn.mean(0) if bool(raters[image].any()) else rows[image].mean(0)
            chosen.append(self._of_one(tokens.features[image], rated, ctx))
        return Selection.stack(chosen)

    def handed_on(self, count: int, keep: int) -> int:
        """What is recycled comes on top."""
        if self.version == 2 or keep >= count:
            return min(count, keep)
        return keep + (int(0.3 * (count - keep)) + 1) // 10 + 1

    def _of_one(self, features: Tensor, rated: Tensor, ctx: Context) -> Selection:
        """One picture: its tokens ``[N, D]`` and the raters' map ``[R, N]``."""
        count, score = len(features), rated.mean(0)
        keep = self._count(count, rated, ctx)
        if keep >= count:
            return Selection.identity(1, count, features.device)
        order = score.argsort(descending=True, stable=True)
        kept, gone = order[:keep].sort().values, order[keep:]
        if self.version == 2:
            return Selection(kept[None], count)
        recycled = gone[: int(0.3 * len(gone)) + 1]
        clusters = int(len(recycled) / 10) + 1
        centers, label = ops.dpc_knn(features[recycled][None], clusters, clusters)
        weight = 1.0 / torch.bincount(label[0], minlength=clusters).to(score.dtype)
        slot = (label + keep).scatter(1, centers, -1)  # a centre is its slot's own token
        own = torch.cat([torch.ones_like(score[:keep]), weight])
        index = torch.cat([kept, recycled[centers[0]]])
        return Selection.merge(
            index[None], count, recycled[None], slot, weight[label], own[None], gaps=True
        )

    def _count(self, count: int, rated: Tensor, ctx: Context) -> int:
        """Tokens that stay of ``count``."""
        if self.adaptive is not None:
            rank = int(torch.linalg.matrix_rank(rated))
            return max(1, count - max(0, int(self.adaptive * (count - rank))))
        return min(ctx.num_keep, count - 1) if self.official else ctx.num_keep

    def _gravity(self, ctx: Context) -> Tensor:
        """What vectors of ones give each other at rater and token, ``[B, R, N]``."""
        tables = ctx[RotaryTables()]
        cosine, sine = tables[:, 0], tables[:, 1]
        half = cosine.shape[-1] // 2
        turned = torch.cat([cosine[..., :half] - sine[..., :half],
                            cosine[..., half:] + sine[..., half:]], dim=-1)  # fmt: skip
        asked, seen = ctx[TextSlots()].clamp(min=0), ctx[Slots()]
        wide = turned.shape[-1]
        rows = turned.gather(1, asked[..., None].expand(-1, -1, wide))
        columns = turned.gather(1, seen[..., None].expand(-1, -1, wide))
        return rows @ columns.transpose(1, 2) / wide**0.5
