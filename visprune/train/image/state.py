# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: all of its state in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from visprune.errors import ConfigError
from visprune.train.checkpoint import read_info, write_tensors

__all__ = ["load_state", "save_state"]


def save_state(
    path: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    info: Mapping[str, Any],
) -> None:
    """Write a checkpoint; a kill or a full disk at any moment leaves the old one as it was.

    Args:
        path: File to replace.
        tensors: State dicts by name (``model``, ``ema``).
        optimizer: Its state of every kind (moments, momentum, factored moments) is stored too.
        info: What JSON can hold, the step among it.

    Raises:
        ConfigError: It cannot be written; the message says that the old one is still there.
    """
    flat = {f"{part}/{name}": t for part, state in tensors.items() for name, t in state.items()}
    state, plain = optimizer.state_dict(), {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                flat[f"optimizer/{number}/{key}"] = value
            else:
                plain[f"{number}/{key}"] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    optimizer_info = {"state": plain, "groups": [_jsonable(group) for group in groups]}
    write_tensors(path, flat, {**info, "optimizer": optimizer_info})


def load_state(
    path: Path, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint; the optimiser gets its state back.

    Returns:
        State dicts by name, and the info.

    Raises:
        ConfigError: The file is not there, or its optimiser is another.
    """
    info = read_info(path)
    own = optimizer.state_dict()
    saved = info.pop("optimizer")
    if len(saved["groups"]) != len(own["param_groups"]):
        raise ConfigError(f"{path} was written with another optimiser or other trained parts.")
    parts: dict[str, dict[str, Tensor]] = {}
    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            part, _, name = key.partition("/")
            if part == "optimizer":
                number, _, entry = name.partition("/")
                state.setdefault(int(number), {})[entry] = file.get_tensor(key)
            else:
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    for key, value in saved["state"].items():
        number, _, entry = key.partition("/")
        state.setdefault(int(number), {})[entry] = value
    groups = [
        {**group, **new} for group, new in zip(own["param_groups"], saved["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return parts, info


def _jsonable(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and switches of a parameter group; some optimisers count their steps there."""
    return {
        key: value
        for key, value in group.items()
        if isinstance(value, int | float | str | bool) and json.dumps(value)
    }
