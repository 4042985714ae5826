# SPDX-License-Identifier: Apache-2.0
"""Token reduction while training: in force on the model and its moving average, on a schedule."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from visprune.catalog import get_method
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError
from visprune.machine.run import prune
from visprune.train.image.recipe import PruneConfig

__all__ = ["Reduction", "keep_ratio_at"]


def keep_ratio_at(epoch: float, final: float, start: float, length: float) -> float:
    """The ratio of kept tokens at a point of training (EViT, arXiv:2202.07800).

    1 until ``start``, then along a cosine to ``final`` over ``length`` epochs. The official
    ``adjust_keep_rate`` does the same with iterations.
    """
    if epoch < start:
        return 1.0
    if length <= 0 or epoch >= start + length:
        return final
    done = (epoch - start) / length
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


class Reduction:
    """A method in force on one model, with a ratio that may change from step to step.

    Args:
        model: The model.
        config: The recipe's section.
        learned: The method's own modules, to share with another run; None to make new ones.
    """

    def __init__(
        self, model: nn.Module, config: PruneConfig, learned: nn.ModuleList | None = None
    ) -> None:
        self.model, self.config = model, config
        self.final: PruningMethod = get_method(config.method, **config.args)
        shrinks = bool(config.shrink_start or config.shrink_epochs)
        if shrinks and getattr(self.final, "keep_ratio", None) is None:
            raise ConfigError(
                f"prune.shrink_start and shrink_epochs need a keep_ratio, which {config.method} "
                f"was not given."
            )
        self.run: Any = prune(model, _with(self.final, learned))
        if config.model_lr_scale != 1 and self.learned is None:
            self.run.remove()
            raise ConfigError(
                f"prune.model_lr_scale is {config.model_lr_scale}, and {config.method} has no "
                f"predictor that would learn at the whole rate. Leave it out."
            )

    @property
    def learned(self) -> nn.ModuleList | None:
        """The method's own modules."""
        return self.run.learned

    def copy_to(self, model: nn.Module) -> Reduction:
        """The same on a copy of the model, with a copy of what the method learns."""
        return Reduction(model, self.config, copy.deepcopy(self.learned))

    def at(self, epoch: float) -> None:
        """Take up the method as training has it at a point of time."""
        config, final = self.config, self.final
        if not (config.shrink_start or config.shrink_epochs):
            return self._use(final)
        goal: float = final.keep_ratio  # type: ignore[attr-defined]
        ratio = keep_ratio_at(epoch, goal, config.shrink_start, config.shrink_epochs)
        if ratio == goal:
            return self._use(final)
        return self._use(dataclasses.replace(final, keep_ratio=ratio))  # type: ignore[call-arg]

    def at_the_end(self) -> None:
        """Take up the method as the finished model has it."""
        self._use(self.final)

    def _use(self, method: PruningMethod) -> None:
        if method == self.run.method:
            return
        learned = self.learned
        self.run.remove()
        self.run = prune(self.model, _with(method, learned))

    def survivors(self) -> tuple[Tensor, Tensor]:
        """Where the final tokens of the last forward came from.

        Returns:
            Patch of each ``[B, K]`` (0 where a token is no patch's own), and whether it is one
            ``[B, K]``. A learned method trains at full length; then it is its last decision.
        """
        if self.model.training and self.run.decisions:
            last = self.run.decisions[-1].detach()
            every = torch.arange(last.shape[1], device=last.device)
            return every.expand(len(last), -1), last > 0.5
        kept = torch.stack(self.run.kept)
        return kept.clamp_min(0), kept >= 0


def _with(method: PruningMethod, learned: nn.ModuleList | None) -> PruningMethod:
    """The method, going on with what it has learned."""
    if learned is None:
        return method
    return dataclasses.replace(method, learned=learned)  # type: ignore[call-arg]
