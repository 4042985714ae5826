# SPDX-License-Identifier: Apache-2.0
"""Random draws that depend on a picture's pixels and a seed, not on the batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from visprune import ops
from visprune.core import Selection, VisualTokens


def draw(
    tokens: VisualTokens, num_keep: int, fingerprints: Iterable[int], seed: int, stage: int
) -> Selection:
    """Keep ``num_keep`` tokens of each picture, drawn without replacement."""
    if not isinstance(fingerprints, Tensor):
        fingerprints = torch.tensor(list(fingerprints), dtype=torch.int64)
    start = (seed * 1_000_003 + stage * 7_919) % 2**62
    drawn = ops.draw_tokens(fingerprints, tokens.num_tokens, num_keep, start)
    return Selection.keep(drawn.to(tokens.features.device), tokens.num_tokens)
