# SPDX-License-Identifier: Apache-2.0
"""Stored outputs of official architectures, and what was counted of their variants."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

GOLDEN = Path(__file__).parents[1] / "golden"


def cases(family: str, **params: Any) -> list[Any]:
    """The cases of a family, those with these parameters."""
    found = json.loads((GOLDEN / family / "cases.json").read_text())["cases"]
    return [{"family": family, **c} for c in found if params.items() <= c["params"].items()]


def stored(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a case, and its weights apart."""
    tensors = load_file(GOLDEN / case["family"] / case["file"])
    weights = {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}
    return tensors, weights


def load(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Official weights by their own names: no other key, none left but counters of batch norms."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert unexpected == [], unexpected
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    assert missing == [], missing
    return module.eval()


def published(family: str) -> dict[str, Any]:
    """Counts of the official code of every variant."""
    found: dict[str, Any] = json.loads((GOLDEN / family / "published.json").read_text())
    return found["variants"]


def digest(model: nn.Module) -> tuple[int, str]:
    """Number of entries of the state dict, and sha256 of its sorted "key shape" lines."""
    lines = sorted(f"{name} {tuple(value.shape)}\n" for name, value in model.state_dict().items())
    return len(lines), hashlib.sha256("".join(lines).encode()).hexdigest()


def gmacs(model: nn.Module, size: int) -> float:
    """Multiply-adds of one image, in thousand millions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9
