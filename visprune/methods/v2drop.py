# SPDX-License-Identifier: Apache-2.0
"""V2Drop: drop the tokens that a layer changes least (CVPR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visprune.core import (
    Budget,
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
from visprune.core.signals import HiddenStates
from visprune.errors import BudgetError, ConfigError
from visprune.methods._depths import increasing


@dataclass(frozen=True, kw_only=True)
class V2Drop(PruningMethod):
    """Keeps, at three depths, the tokens whose state the layer before has changed most.

    The change is the Euclidean norm of what entered this layer minus what entered the one before;
    ties keep the lower index. As in the official code a stage keeps ``max(1, int(ratio * n))`` of
    the n tokens *left*, with ratios 0.25, 0.05 and 0 (one token) before layers 3, 16 and 22 of 28,
    in spatial order and with their position ids. No attention map is read. The official code takes
    one picture alone; here every picture of a batch is thinned out by itself.

    Args:
        ratios: what each stage keeps of the tokens left.
        num_keep: in place of ``ratios``: tokens of one image that survive the last stage; a stage
            keeps four times as many as the one after it.
        keep_ratio: the same as a fraction of the image's own tokens.
        num_keep_per_frame: the same of each frame of a clip.
        layers: where the stages are: 0-based layers, at least 1, or fractions of the depth.
    """

    name: ClassVar[str] = "v2drop"

    ratios: tuple[float, ...] | None = None
    num_keep: int | None = None
    keep_ratio: float | None = None
    num_keep_per_frame: int | None = None
    layers: tuple[int | float, ...] = (3 / 28, 16 / 28, 22 / 28)

    def __post_init__(self) -> None:
        """Check ratios and budget."""
        super().__post_init__()
        object.__setattr__(self, "layers", increasing("v2drop", self.layers))
        if self.last is not None:
            if self.ratios is not None:
                raise BudgetError(
                    "v2drop takes ratios, or num_keep, keep_ratio or num_keep_per_frame; give one."
                )
            return
        ratios = (0.25, 0.05, 0.0) if self.ratios is None else tuple(self.ratios)
        if len(ratios) != len(self.layers) or not all(0.0 <= r <= 1.0 for r in ratios):
            raise ConfigError(
                f"ratios are what the stages at {len(self.layers)} layers keep, each in [0, 1]; "
                f"got {ratios}."
            )
        object.__setattr__(self, "ratios", ratios)

    @property
    def last(self) -> Budget | None:
        """Of the last stage; ``None``: there are ratios."""
        return Budget.maybe(
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            num_keep_per_frame=self.num_keep_per_frame,
        )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage per layer; on a shallow model the deeper of two that fall together counts."""
        stages: dict[int, Stage] = {}
        for number, layer in enumerate(self.layers):
            at = Site.decoder(layer).resolve(spec.num_layers)
            stages[at] = Stage(Site.decoder(at), self._budget(number), (HiddenStates(),))
        return tuple(stages.values())

    def _budget(self, number: int) -> Budget | StepBudget:
        if self.last is not None:
            return self.last.scaled(4.0 ** (len(self.layers) - 1 - number), rounding="round")
        assert self.ratios is not None, "one of the two"
        return StepBudget(keep_ratio=self.ratios[number], rounding="floor")

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Top-k of the change."""
        change = tokens.features - ctx[HiddenStates()].to(tokens.features.dtype)
        wide = torch.promote_types(change.dtype, torch.float32)
        change = torch.linalg.vector_norm(change, dim=-1, dtype=wide)
        return Selection.top(change, ctx.num_keep)

    def macs(self, count: int, keep: int, width: int) -> int:
        """One square per feature."""
        return count * width
