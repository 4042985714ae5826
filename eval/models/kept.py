# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a picture survived, as bits for a record."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["bits_of", "kept_map"]


def bits_of(kept: Tensor) -> str:
    """A bool map ``[h, w]`` as base64 of its bits, row by row."""
    return base64.b64encode(np.packbits(kept.numpy()).tobytes()).decode()


def kept_map(run: Any, row: int) -> dict[str, Any] | None:
    """Which tokens of a sample's picture survived, as bits, per grid that it was cut into.

    Args:
        run: the run, after a prefill of the batch.
        row: number of the sample in the batch.

    Returns:
        ``{"grid": [h, w], "kept": base64}`` of the last grid (the whole picture in full size), with
        ``regions`` where there are several; ``None`` unless the sample has one picture, which is
        made of patches.
    """
    trace = run.trace
    mine = [i for i, owner in enumerate(trace.image_rows) if owner == row]
    if len(mine) != 1 or trace.placed[mine[0]] == "queries":  # these are no patches
        return None
    pos = trace.all_pos[mine[0]].cpu()  # [N, 3]
    alive = torch.zeros(len(pos), dtype=torch.bool)
    alive[trace.kept[mine[0]].cpu()] = True
    regions = []
    for region in pos[:, 0].unique().tolist():
        here = pos[:, 0] == region
        h, w = (int(x) + 1 for x in pos[here][:, 1:].amax(0))
        bits = torch.zeros((h, w), dtype=torch.bool)
        bits[pos[here, 1], pos[here, 2]] = alive[here]
        regions.append({"grid": [h, w], "kept": bits_of(bits)})
    return {**regions[-1], "regions": regions} if len(regions) > 1 else regions[-1]
