# SPDX-License-Identifier: Apache-2.0
"""From YAML to a recipe, every key and range checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from visprune.errors import ConfigError, did_you_mean
from visprune.train.image.recipe import ImageRecipe
from visprune.train.sections import build_section

__all__ = ["build_recipe", "recipe_dict"]


def build_recipe(raw: Mapping[str, Any], where: str) -> ImageRecipe:
    """Build a recipe from what YAML gave.

    Args:
        raw: The file's content, overrides applied.
        where: The file, for messages.

    Returns:
        The recipe, every name and range checked.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not allowed.
    """
    recipe = build_section(ImageRecipe, raw, where)
    _check(recipe)
    return recipe


def recipe_dict(recipe: ImageRecipe) -> dict[str, Any]:
    """The recipe as plain values, for JSON."""
    return asdict(recipe)


def _check(recipe: ImageRecipe) -> None:
    for name, value, allowed in (
        ("task", recipe.task, ("image_classification",)),
        ("precision", recipe.precision, ("fp32", "bf16")),
        ("data.on_corrupt", recipe.data.on_corrupt, ("refuse", "skip")),
    ):
        if value not in allowed:
            raise ConfigError(
                f"{name} is {value!r}.{did_you_mean(value, allowed)} Allowed: {', '.join(allowed)}."
            )
    above_zero = {
        "batch": recipe.batch,
        "save_every": recipe.save_every,
        "log_every": recipe.log_every,
        "validate_every": recipe.validate_every,
        "schedule.epochs": recipe.schedule.epochs,
        "optimizer.lr": recipe.optimizer.lr,
    }
    if recipe.threads is not None:
        above_zero["threads"] = recipe.threads
    if recipe.optimizer.clip_grad is not None:
        above_zero["optimizer.clip_grad"] = recipe.optimizer.clip_grad
    for name in ("train_limit", "val_limit"):
        if getattr(recipe.data, name) is not None:
            above_zero[f"data.{name}"] = getattr(recipe.data, name)
    for name, number in above_zero.items():
        if number <= 0:
            raise ConfigError(f"{name} is {number}; it must be above 0.")
    at_least_zero = {
        "seed": recipe.seed,
        "data.workers": recipe.data.workers,
        "augment.mixup": recipe.augment.mixup,
        "augment.cutmix": recipe.augment.cutmix,
        "optimizer.weight_decay": recipe.optimizer.weight_decay,
        "schedule.warmup_epochs": recipe.schedule.warmup_epochs,
    }
    for name, number in at_least_zero.items():
        if number < 0:
            raise ConfigError(f"{name} is {number}; it must be 0 or above.")
    if recipe.prune is not None and not 0 <= recipe.prune.model_lr_scale <= 1:
        raise ConfigError(
            f"prune.model_lr_scale is {recipe.prune.model_lr_scale}; allowed: 0 to 1."
        )
    if recipe.micro_batch is not None and (
        recipe.micro_batch < 1 or recipe.batch % recipe.micro_batch
    ):
        raise ConfigError(
            f"micro_batch is {recipe.micro_batch}; it must divide batch ({recipe.batch})."
        )
    for name in ("smoothing", "mix_prob", "switch_prob"):
        if not 0 <= getattr(recipe.augment, name) <= 1:
            raise ConfigError(
                f"augment.{name} is {getattr(recipe.augment, name)}; allowed: 0 to 1."
            )
    if recipe.ema is not None and not 0 < recipe.ema.decay < 1:
        raise ConfigError(f"ema.decay is {recipe.ema.decay}; it must lie between 0 and 1.")
