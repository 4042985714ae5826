# SPDX-License-Identifier: Apache-2.0
"""Models that one would take instead of a reduced vision transformer, with published accuracy.

Figures of timm's own table of results on ImageNet-1k (repository at aa4b5850), which evaluates the
weights it ships: at this size, and trained as it says. They are no measurement of ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """What was published of a model.

    Attributes:
        top1: percent of ImageNet-1k's validation pictures.
        size: side of the pictures that it was evaluated on.
        training: what it was trained with beyond labels of ImageNet-1k; empty: nothing.
    """

    top1: float
    size: int = 224
    training: str = ""

    def __str__(self) -> str:
        at = "" if self.size == 224 else f" @{self.size}"
        return f"{self.top1:.1f}{at}" + (f" ({self.training})" if self.training else "")


PEERS = {
    "efficientvit_b2": Peer(82.16),
    "fastvit_sa12": Peer(81.84, 256, "distilled"),
    "repvit_m1_1": Peer(81.31, training="distilled"),
    "mobilenetv4_hybrid_medium": Peer(81.5, 256),
    "convnext_tiny": Peer(82.07),
    "hiera_small_224": Peer(83.89, training="MAE first"),
}
# Dense models that others are timed beside, and ours (as their papers have it).
PUBLISHED = {
    **PEERS,
    "deit_small_patch16_224": Peer(79.86),
    "deit3_small_patch16_224": Peer(81.38),
    "deit_base_patch16_224": Peer(81.98),
    "swin_tiny_patch4_window7_224": Peer(81.39),
    "litv2_s": Peer(82.0),
    "nat_mini": Peer(81.8),
}


def published(name: str) -> Peer | None:
    """What was published of a model of timm, whatever weights its name goes on to ask for."""
    return PUBLISHED.get(name.partition(".")[0])
