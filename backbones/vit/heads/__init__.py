# SPDX-License-Identifier: Apache-2.0
"""Heads that read all tokens of an encoder: what its patches know, dense or pruned.

:class:`EfficientProbing` (arXiv 2506.10178) pools with a few learned queries,
:class:`MultiBranchAttention` and :class:`MultiHeadBranches` (ACMIL, arXiv 2311.07125) with several
branches that are made to look at different tokens. :class:`TokenProbe` puts one behind a frozen
encoder.
"""

from __future__ import annotations

from visprune.backbones.vit.heads.branches import (
    BranchOutput,
    MultiBranchAttention,
    MultiHeadBranches,
    branch_loss,
    mask_top_tokens,
)
from visprune.backbones.vit.heads.efficient_probing import EfficientProbing
from visprune.backbones.vit.heads.probe import ProbeHead, TokenProbe

__all__ = [
    "BranchOutput",
    "EfficientProbing",
    "MultiBranchAttention",
    "MultiHeadBranches",
    "ProbeHead",
    "TokenProbe",
    "branch_loss",
    "mask_top_tokens",
]
