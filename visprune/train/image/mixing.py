# SPDX-License-Identifier: Apache-2.0
"""Mixup, cutmix and label smoothing, the same on any number of processes."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor

from visprune.errors import ConfigError
from visprune.train.image.recipe import AugmentConfig, ImageRecipe
from visprune.train.image.seeds import MIX, seeded

__all__ = ["Mixer", "check_micro_batch"]


class Mixer:
    """Mixup, cutmix and label smoothing of a batch, by timm's ``Mixup`` in batch mode.

    Args:
        augment: Its settings.
        classes: Number of classes.
        seed: Seed of the recipe.
    """

    def __init__(self, augment: AugmentConfig, classes: int, seed: int) -> None:
        self.seed, self.classes, self.smoothing = seed, classes, augment.smoothing
        self.mixup = None
        if augment.mixup > 0 or augment.cutmix > 0:
            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                mode="batch",
                label_smoothing=augment.smoothing,
                num_classes=classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix a (micro-)batch; the same ratio and box for all micro-batches of a step.

        Returns:
            Images, and targets ``[B, classes]``.
        """
        if self.mixup is not None:
            with seeded(self.seed, MIX, step):
                return self.mixup(images, labels)
        off = self.smoothing / self.classes
        target = torch.full((len(labels), self.classes), off, device=images.device)
        return images, target.scatter_(1, labels[:, None], 1 - self.smoothing + off)


def check_micro_batch(recipe: ImageRecipe, world: int) -> int:
    """Pictures per forward pass.

    Raises:
        ConfigError: The batch cannot be divided so, or is mixed in micro-batches of odd size.
    """
    size = recipe.micro_batch or recipe.batch // world
    if recipe.batch % size or (recipe.batch // size) % world:
        raise ConfigError(
            f"batch {recipe.batch} in micro-batches of {size} cannot be shared by {world} "
            f"processes; choose a batch that is a multiple of micro_batch x {world}."
        )
    if size % 2 and (recipe.augment.mixup or recipe.augment.cutmix):
        raise ConfigError(f"Mixing needs micro-batches of even size, got {size}.")
    return size
