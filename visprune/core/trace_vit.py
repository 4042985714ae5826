# SPDX-License-Identifier: Apache-2.0
"""What happened in the last forward of a vision transformer: tokens per layer, and where from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class ViTTrace:
    """The record of the last forward.

    Patches are counted; prefix tokens (class, distillation, registers) stay, and are not.

    Attributes:
        tokens_per_layer: patches that entered the attention of each layer, one list per picture.
        mlp_tokens_per_layer: patches that entered its MLP.
        kept: one int64 tensor per picture: the patch that each final slot stands for, in slot
            order.
        slots: one int64 tensor per picture: the final slot of every patch, -1 where dropped.
        sizes: one tensor per picture: patches in each final slot.
        pos: the (t, h, w) of ``kept``, one ``[K, 3]`` tensor per picture.
        num_tokens: patches that each picture had.
        prefix: prefix tokens of a picture.
        grids: for every picture, (t, h, w) in patches.
        stages: one dict per stage that ran: site, patches before and after.
        selection_macs: multiply-adds spent on scores and selection, whole batch.
    """

    tokens_per_layer: list[list[int]] = field(default_factory=list)
    mlp_tokens_per_layer: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    pos: list[Tensor] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    prefix: int = 0
    grids: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    selection_macs: int = 0

    @property
    def mean_tokens(self) -> list[float]:
        """Patches averaged over the layers, one number per picture."""
        return [sum(row) / len(row) for row in self.tokens_per_layer]

    def __str__(self) -> str:
        lines = [
            f"picture {number}: patches per layer {row}, {len(kept)} left of {total}"
            for number, (row, kept, total) in enumerate(
                zip(self.tokens_per_layer, self.kept, self.num_tokens, strict=True)
            )
        ]
        lines += [f"stage {number}: {stage}" for number, stage in enumerate(self.stages)]
        return "\n".join(lines)
