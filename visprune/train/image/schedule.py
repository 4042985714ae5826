# SPDX-License-Identifier: Apache-2.0
"""The learning rate of a run, by timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from visprune.errors import ConfigError
from visprune.train.image.recipe import ScheduleConfig
from visprune.train.sections import known_name

__all__ = ["build_schedule"]


def build_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Any:
    """The schedule that a recipe names, to be set by the number of the step.

    Raises:
        ConfigError: timm has none of that name, or it does not take the arguments.
    """
    # plateau depends on what was measured before, so a step would not be a function of its number.
    known_name(
        config.name,
        ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"),
        "schedule.name",
    )
    schedule: Any = create_scheduler_v2  # annotated for whole epochs, computes with any
    try:
        scheduler, _ = schedule(
            optimizer,
            sched=config.name,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **config.args,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule: {error}.") from error
    if scheduler is None:
        raise ConfigError(f"This timm has no schedule {config.name!r}; a newer one may.")
    return scheduler
