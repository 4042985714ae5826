# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: weights, optimiser and step in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
    write_tensors(path, tensors, info)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Replace a safetensors file: on disk there is the old or the new one, whole, at any moment.

    Args:
        path: File to replace.
        tensors: Its tensors.
        info: What JSON can hold.

    Raises:
        ConfigError: It cannot be written (a full disk ...). The old file is as it was.
    """
    fresh = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(ready, fresh, metadata={"info": json.dumps(info)})
        with fresh.open("rb") as file:  # a rename may reach the disk before the data does
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        fresh.unlink(missing_ok=True)
        left = "The one before it is whole." if path.is_file() else "There was none before."
        raise ConfigError(f"Cannot write the checkpoint {path}: {error}. {left}") from error


def read_info(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ConfigError: If the file is not there, or is no checkpoint.
    """
    if not path.is_file():
        raise ConfigError(f"There is no checkpoint {path.name!r} in {path.parent}.")
    try:
        with safe_open(path, framework="pt") as file:
            info: dict[str, Any] = json.loads(file.metadata()["info"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} is no whole checkpoint of a training run ({error}). Remove it to begin anew, "
            f"or put a copy in its place."
        ) from error
    return info


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
