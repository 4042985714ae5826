# SPDX-License-Identifier: Apache-2.0
"""DynamicViT: learn which patches to keep (NeurIPS 2021, arXiv:2106.02034)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visprune.core import BudgetedMethod, Context, ModelSpec, Schedule, Selection, VisualTokens
from visprune.errors import ConfigError
from visprune.methods._depths import DEPTHS, checked_depths, geometric


class Predictor(nn.Module):
    """Log-probability of keeping and of dropping each patch.

    Half of a patch's features meet the mean of the other half over the patches that are still
    there. Parameter names are those of the official ``PredictorLG``.

    Args:
        width: features of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.checked = False
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def weight(self) -> Tensor:
        """Of the first linear layer."""
        return self.in_conv.get_parameter("1.weight")

    def warn_if_new(self) -> None:
        """Say once that the predictor has not learned anything, where that is so."""
        reads_nothing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.checked or reads_nothing or self.weight.is_meta:
            return
        self.checked = True
        # They begin at zero, and the first step of any training moves them.
        if not any(bool(m.bias.any()) for m in self.modules() if isinstance(m, nn.Linear)):
            warnings.warn(
                "dynamicvit's predictors are new and pick patches at random: train run.learned, "
                "give learned=... trained ones, or load a model that visprune.save_pretrained "
                "wrote. (method 'random' is the control that means to.)",
                stacklevel=2,
            )

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        """``x`` ``[B, N, D]``, ``policy`` ``[B, N]`` (1: still there) to ``[B, N, 2]``."""
        # An encoder may keep some parameters in fp32 and compute in another (open_clip does).
        x = self.in_conv(x.to(self.weight.dtype))
        own, shared = x.chunk(2, dim=-1)
        there = policy[..., None].to(x.dtype)
        # A draw in training may leave a picture no patch at all.
        count = there.sum(1, keepdim=True).clamp_min(1.0)
        shared = (shared * there).sum(1, keepdim=True) / count
        return self.out_conv(torch.cat([own, shared.expand_as(own)], dim=-1))


@dataclass(frozen=True, kw_only=True)
class DynamicViT(BudgetedMethod):
    """Keeps, on entering three layers of an encoder, the patches that a small network picks.

    On entering layers 3, 6 and 9 of 12, ``int(keep_ratio ** s * n)`` of a picture's n patches stay
    after the s-th stage, by the predictor's log-probability, in falling order of it as in the
    official code. In training no patch leaves: a patch is kept or dropped by a straight-through
    Gumbel draw, a dropped one is no key of any later layer but to itself, and gradients reach the
    predictors through attention, the official ones: a patch's own row says nothing of its decision.
    ``run.decisions`` has the draws and ``run.ratios`` what their means should be, for the ratio
    loss.

    Difference: the official attention in training adds 1e-6 to every sum, which no row needs here.

    The predictors are new, and have to be trained: ``run.learned``. Without training they pick at
    random, with a warning. Training is offered for timm's ``VisionTransformer`` with its plain
    ``Attention`` and without attention pooling, and refused elsewhere: EVA and all rotary models,
    open_clip's and transformers' towers, pooling by attention ("map"), differential attention, and
    blocks whose attention and MLP run side by side. There, and inside a vision-language model's
    encoder, the predictors pick at random unless ``learned`` brings trained ones.

    Args:
        layers: where: 0-based layers, or fractions of the depth.
        learned: predictors of an earlier run, to go on with.
    """

    name: ClassVar[str] = "dynamicvit"

    layers: Sequence[int | float] = DEPTHS
    learned: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check budget and layers."""
        super().__post_init__()
        object.__setattr__(self, "layers", checked_depths(self.layers))

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage per layer, on entering it."""
        return geometric(self.budget, self.layers, spec, after_attention=False)

    def build_learned(self, spec: ModelSpec) -> nn.ModuleList:
        """A predictor for every stage.

        Raises:
            ConfigError: ``learned`` is for another number of stages.
        """
        count = len(self.schedule(spec))
        if self.learned is None:
            return nn.ModuleList(Predictor(spec.encoder_width) for _ in range(count))
        if len(self.learned) != count:
            raise ConfigError(
                f"learned holds {len(self.learned)} predictors; this schedule has {count} stages."
            )
        return self.learned

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The most probable."""
        batch, count, device = tokens.features.shape[0], tokens.num_tokens, tokens.features.device
        if ctx.num_keep == count:
            return Selection.identity(batch, count, device)
        score = self._scores(tokens, ctx)[..., 0]
        if ctx.stage == 0 and isinstance(ctx.learned, Predictor):
            ctx.learned.warn_if_new()
        order = score.argsort(dim=1, descending=True, stable=True)
        return Selection(order[:, : ctx.num_keep], count)

    def decide(self, tokens: VisualTokens, ctx: Context) -> Tensor:
        """Draw for each patch, in training."""
        drawn = nn.functional.gumbel_softmax(self._scores(tokens, ctx), hard=True)[..., 0]
        return drawn * tokens.size

    def _scores(self, tokens: VisualTokens, ctx: Context) -> Tensor:
        """Log-probabilities of keeping and dropping, ``[B, N, 2]``."""
        if ctx.learned is None:
            raise ConfigError(f"{self.name} was given no predictor for stage {ctx.stage}.")
        return ctx.learned(tokens.features, tokens.size)

    def to_dict(self) -> dict[str, Any]:
        """Without the predictors: they are weights, and are saved as such."""
        fields = {"num_keep": self.num_keep, "keep_ratio": self.keep_ratio, "layers": self.layers}
        return {"method": self.name, "positions": self.positions, "strict": self.strict, **fields}

    def macs(self, count: int, keep: int, width: int) -> int:
        """The predictor's linear layers."""
        half, quarter = width // 2, width // 4
        return count * (width * width + width * half + half * quarter + 2 * quarter)
