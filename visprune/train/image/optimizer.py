# SPDX-License-Identifier: Apache-2.0
"""The optimiser of a run, by timm, and one step of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from visprune.errors import ConfigError
from visprune.train.image.recipe import OptimizerConfig
from visprune.train.sections import known_name

try:
    muon: Any = import_module("timm.optim.muon")
except ModuleNotFoundError:  # an older timm
    muon = None

__all__ = ["build_optimizer", "scale_rate", "take_step"]

_ITERATION = "zeropower_via_newtonschulz"


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a recipe names.

    Raises:
        ConfigError: timm has none of that name, or it does not take the arguments.
    """
    known_name(config.name, [str(name) for name in list_optimizers()], "optimizer.name")
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **config.args,
        )
    except TypeError as error:
        raise ConfigError(f"optimizer.args do not fit {config.name}: {error}.") from error


def scale_rate(optimizer: torch.optim.Optimizer, scale: float, but: Iterable[nn.Parameter]) -> None:
    """Multiply the learning rate of all parameters but some, before the first step.

    Args:
        optimizer: as built; timm's schedules multiply each group's rate by its ``lr_scale``.
        scale: the factor.
        but: parameters that keep their rate.
    """
    spared = {id(parameter) for parameter in but}
    groups = []
    for group in optimizer.param_groups:
        for kept in (False, True):
            parameters = [p for p in group["params"] if (id(p) in spared) is kept]
            factor = group.get("lr_scale", 1.0) * (1.0 if kept else scale)
            groups.append({**group, "params": parameters, "lr_scale": factor})
    optimizer.param_groups[:] = [group for group in groups if group["params"]]


def take_step(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Update the weights by their gradients."""
    with _iterate_in_fp32(device):
        optimizer.step()


@contextmanager
def _iterate_in_fp32(device: torch.device) -> Iterator[None]:
    """Let timm's Muon orthogonalise in fp32 on a CPU.

    It does so in bf16, and offers no other. On a processor without bf16 products a step of a small
    ViT then takes 1.5 s instead of 0.1 s, more than its forward and backward.
    """
    plain = getattr(muon, _ITERATION, None)
    if device.type != "cpu" or plain is None or "dtype" not in inspect.signature(plain).parameters:
        yield
        return
    setattr(muon, _ITERATION, partial(plain, dtype=torch.float32))
    try:
        yield
    finally:
        setattr(muon, _ITERATION, plain)
