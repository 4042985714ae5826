# SPDX-License-Identifier: Apache-2.0
"""Random draws that depend on a picture's pixels and a seed, not on the batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from visprune.core import Selection, VisualTokens


def draw(
    tokens: VisualTokens, num_keep: int, fingerprints: Iterable[int], seed: int, stage: int
) -> Selection:
    """Keep ``num_keep`` tokens of each picture, drawn without replacement."""
    drawn = []
    for fingerprint in fingerprints:
        state = seed * 1_000_003 + stage * 7_919 + fingerprint
        generator = torch.Generator().manual_seed(state % 2**63)
        drawn.append(torch.randperm(tokens.num_tokens, generator=generator)[:num_keep])
    return Selection.keep(torch.stack(drawn).to(tokens.features.device), tokens.num_tokens)
