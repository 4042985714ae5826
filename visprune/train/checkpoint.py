# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: weights, optimiser and step in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from visprune.errors import ConfigError


def save_checkpoint(
    path: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, info: dict[str, Any]
) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old or the new one, never half.

    Args:
        path: File to replace.
        trained: Parameters by name, in the optimiser's order.
        optimizer: Its moments are stored beside them.
        info: What JSON can hold; the step among it.
    """
    tensors = {}
    for name, parameter in trained.items():
        tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    save_file(tensors, fresh, metadata={"info": json.dumps(info)})
    os.replace(fresh, path)


def read_info(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ConfigError: If the file is not there.
    """
    if not path.is_file():
        raise ConfigError(f"There is no checkpoint {path.name!r} in {path.parent}.")
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["info"])


def load_weights(path: Path, module: nn.Module) -> None:
    """Load a checkpoint's weights into the parameters of the same names; others stay.

    Raises:
        ConfigError: If the file is not there or a name or shape does not fit.
    """
    read_info(path)
    own = dict(module.named_parameters())
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for key in sorted(file.keys()):
            group, _, name = key.partition("/")
            if group != "weight":
                continue
            value = file.get_tensor(key)
            if name not in own or own[name].shape != value.shape:
                raise ConfigError(f"{path}: weight {name!r} does not fit the recipe's model.")
            own[name].copy_(value)


def load_optimizer(
    path: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> None:
    """Load the optimiser's moments of each trained parameter."""
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for name, parameter in trained.items():
            for part in ("step", "exp_avg", "exp_avg_sq"):
                if f"{part}/{name}" in keys:
                    value = file.get_tensor(f"{part}/{name}").to(parameter.device)
                    optimizer.state[parameter][part] = value
