# SPDX-License-Identifier: Apache-2.0
"""ToDRE: diverse tokens, and none once the text stops looking (arXiv:2505.18757)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from visprune import ops
from visprune.core import (
    Budget,
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import ClsAttention, VisualShare
from visprune.errors import BudgetError, ConfigError


@dataclass(frozen=True, kw_only=True)
class ToDRE(PruningMethod):
    """Two stages, each of which can be switched off. There is no official code.

    **Stage 1**, at the projector: greedy diversification of the projected features by cosine, from
    a pivot. ``k_center`` (version 1 of the paper names it): each next token has the largest
    distance to its nearest kept one. ``max_sum`` (version 2, Alg. 1): the smallest sum of cosines
    to all kept ones. The pivot is the patch with most class-token attention in the encoder's last
    layer (mean over heads; of the thumbnail only, where the picture is tiled); an encoder without a
    class token starts from the token farthest in direction from the mean, where the paper says a
    random one will do. Crops and thumbnail are one pool. Kept tokens are in raster order.

    **Stage 2**, on entering decoder layer ``7L/8`` (rounded down; 28 of 32): all visual tokens of a
    sample leave if the share of attention that its text gives them in the layer before is below
    ``tau`` (mean over heads and over the text tokens after the first visual one). The paper also
    asks that the share of attention from visual to text tokens be below ``tau``; under a causal
    mask it is zero wherever the question follows the picture. Each sample of a batch decides alone.

    Args:
        num_keep: tokens of one image that stage 1 keeps.
        keep_ratio: the same as a fraction.
        num_keep_per_frame: the same of each frame of a clip; one of the three, if ``stage1``.
        objective: of stage 1.
        stage1: whether stage 1 is on.
        stage2: whether stage 2 is on.
        tau: threshold of stage 2; 0 never fires, above 1 always does.
        depth: where stage 2 acts: a 0-based layer, or a fraction of the depth.
    """

    name: ClassVar[str] = "todre"
    served: ClassVar[Mapping[str, Any]] = {"stage2": False}

    num_keep: int | None = None
    keep_ratio: float | None = None
    num_keep_per_frame: int | None = None
    objective: Literal["k_center", "max_sum"] = "k_center"
    stage1: bool = True
    stage2: bool = True
    tau: float = 0.10
    depth: int | float = 7 / 8

    def __post_init__(self) -> None:
        """Check values that belong together."""
        super().__post_init__()
        if self.objective not in ("k_center", "max_sum"):
            raise ConfigError(f"objective is 'k_center' or 'max_sum', got {self.objective!r}.")
        if not self.stage1 and not self.stage2:
            raise ConfigError("Both stages of todre are off; use keep_all to prune nothing.")
        given = (self.num_keep, self.keep_ratio, self.num_keep_per_frame)
        if self.stage1:
            _ = self.budget
        elif given != (None, None, None):
            raise BudgetError("Stage 2 of todre has no budget: leave it out with stage1=False.")
        if not self.tau >= 0.0:
            raise ConfigError(f"tau is a share of attention, at least 0; got {self.tau}.")

    @property
    def budget(self) -> Budget:
        """Of stage 1."""
        return Budget(
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            num_keep_per_frame=self.num_keep_per_frame,
        )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """The stages that are on."""
        stages = []
        if self.stage1:
            stages.append(Stage(Site.projector(), self.budget, wants=(ClsAttention("last"),)))
        if self.stage2:
            stages.append(Stage(Site.decoder(self.depth), None, needs=(VisualShare(),)))
        return tuple(stages)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Stage 1 keeps diverse tokens; stage 2 all or none."""
        if ctx.site.kind == "decoder":
            share = ctx[VisualShare()]
            stay = (share >= self.tau)[:, None].expand(-1, tokens.num_tokens)
            return Selection.where(stay, evidence={"share": share})
        pivot = None
        attention = ctx.get(ClsAttention("last"))
        if attention is not None:
            score = attention.mean(dim=1)  # [B, N]
            if tokens.kind == "image":
                score = score.masked_fill(tokens.pos[..., 0] > 0, float("-inf"))
            pivot = score.argmax(dim=1)
        index = ops.greedy_diverse(
            tokens.features, ctx.num_keep, objective=self.objective, pivot=pivot
        )
        return Selection.keep(index, tokens.num_tokens)

    def macs(self, count: int, keep: int, width: int) -> int:
        """All pairwise cosines, once (k_center), or one product per kept token (max_sum)."""
        if keep == 0:  # stage 2 reads one number
            return 0
        return count * (count if self.objective == "k_center" else keep) * width
