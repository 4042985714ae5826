# SPDX-License-Identifier: Apache-2.0
"""What happened in the last prefill: tokens per layer, kept patches, why a stage fired."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Trace:
    """The record of the last forward that held visual tokens.

    Attributes:
        tokens_per_layer: logical: visual tokens alive in each decoder layer, one list per sample
            (protected newline tokens not counted).
        sequence_per_layer: all tokens alive in each decoder layer (text, visual, protected), one
            list per sample.
        stored_per_layer: physical: slots that each decoder layer computed and stored in its cache,
            one list per sample; above ``sequence_per_layer`` where rows of the batch disagree and
            the shorter is padded.
        kept: one int64 tensor per image (in order of appearance): indices of the surviving tokens
            within the image, in slot order; the token a merged slot stands for.
        pos: the (t, h, w) of those tokens, one ``[K, 3]`` tensor per image.
        num_tokens: tokens that each image had (protected ones not counted).
        image_rows: the sample that each image belongs to.
        grids: for every image, (t, h, w) in patches of all that the encoder saw of it.
        cached_per_layer: slots that each layer had stored before this forward, per sample.
        stages: one dict per stage that ran: site, layer, tokens per image before and after,
            ``clamped`` images, and for withdrawals ``fired`` and the ``share`` per sample.
        positions: ``"original"`` or ``"compact"``.
        ignored_labels: labels that the loss left out since the token that predicts them was
            dropped (0 without labels).
        selection_macs: multiply-adds spent on scores and selection, whole batch.
    """

    tokens_per_layer: list[list[int]] = field(default_factory=list)
    sequence_per_layer: list[list[int]] = field(default_factory=list)
    stored_per_layer: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    pos: list[Tensor] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    image_rows: list[int] = field(default_factory=list)
    grids: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)
    cached_per_layer: list[list[int]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    positions: str = "original"
    ignored_labels: int = 0
    selection_macs: int = 0

    @property
    def mean_tokens(self) -> list[float]:
        """Visual tokens averaged over the decoder layers, one number per sample."""
        return [sum(row) / len(row) for row in self.tokens_per_layer]

    def __str__(self) -> str:
        lines = [f"positions: {self.positions}"]
        for row, (visual, stored) in enumerate(
            zip(self.tokens_per_layer, self.stored_per_layer, strict=True)
        ):
            lines.append(f"sample {row}: visual tokens per layer {visual}, slots stored {stored}")
        lines += [f"stage {number}: {stage}" for number, stage in enumerate(self.stages)]
        return "\n".join(lines)
