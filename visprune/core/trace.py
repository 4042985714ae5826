# SPDX-License-Identifier: Apache-2.0
"""What happened in one forward: tokens per layer, what was kept, why a stage left what it left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from visprune.core.cache.trace import CacheTrace
from visprune.core.selection import Selection


@dataclass
class Trace:
    """The record of the last forward that held visual tokens, of any model.

    ``model`` says what the layers are: those of the decoder of a vision-language model, whose lists
    have one entry a sample, or those of a vision transformer, one entry a picture.

    Attributes:
        model: ``"vlm"`` or ``"vit"``.
        tokens_per_layer: logical: visual tokens alive in each layer (in a vision transformer, those
            that enter its attention), one list per sample; protected newline tokens and prefix
            tokens (class, distillation, registers) are not counted.
        mlp_tokens_per_layer: of a vision transformer: patches that enter each layer's MLP.
        sequence_per_layer: of a decoder: all tokens alive in each layer (text, visual, protected).
        stored_per_layer: physical: slots that each decoder layer computed and stored in its cache;
            above ``sequence_per_layer`` where rows of the batch disagree and the shorter is padded.
        cached_per_layer: slots that each decoder layer had stored before this forward.
        kept: one int64 tensor per image (in order of appearance): the token that each slot stands
            for, in slot order.
        sizes: one per image: patches in each slot, ``[K]``.
        pos: the (t, h, w) of ``kept``, one ``[K, 3]`` tensor per image.
        all_pos: the (t, h, w) of all tokens, ``[N, 3]`` per image.
        num_tokens: tokens that each image had (protected ones not counted).
        image_rows: the sample that each image belongs to.
        grids: for every image, (t, h, w) in patches of all that the encoder saw of it.
        encoded: for every image, where the encoder was given another number of patches than
            ``grids`` (some left out, some to pad it): how many of each frame and of each window,
            else ``None``.
        projected: for every image, the tokens that left the projector; ``None``: one for each block
            of ``grids``.
        placed: for every image, how the places of its tokens are known: ``"grid"``, ``"guessed"``
            from their number, or ``"queries"``: they are no patches.
        stages: one dict per stage that ran: its site, tokens per image before and after,
            ``clamped`` images, and what the method decided by (one number per image). Of stages
            inside an encoder: ``restored``, the layer behind which all patches are there again, or
            in a vision-language model ``encoder``: of each of its layers, the patches of one
            picture of its own size in attention and in MLP.
        chosen: for every image the selections that led to ``kept``, in their order.
        index: of a decoder: for every token of the input its slot behind the last layer, ``[B, S]``
            int64, -1 where it was dropped. Outputs have the length of the input: the row of a
            dropped token repeats that of the last token before it that is still there.
        positions: ``"original"`` or ``"compact"``.
        prefix: tokens before the patches of a vision transformer.
        ignored_labels: labels that the loss left out since the token that predicts them was
            dropped (0 without labels).
        selection_per_row: multiply-adds spent on scores and selection, per sample as if it had been
            alone: padding is not counted.
        unstored: generated tokens since this prompt that later layers did not store (of a method
            that thins answers).
        cache: what an eviction left of the cache, layer by layer and head by head; ``None``: there
            was none.
        ahead: first passes that stages asked for before the decoder: the layers that each ran, and
            the tokens of every sample in them.
        selection_seconds: time that scores, selection and shortening took behind the encoder, of a
            run that is observed (0 without an observer: it would have to wait for the device).
    """

    model: Literal["vlm", "vit"] = "vlm"
    tokens_per_layer: list[list[int]] = field(default_factory=list)
    mlp_tokens_per_layer: list[list[int]] = field(default_factory=list)
    sequence_per_layer: list[list[int]] = field(default_factory=list)
    stored_per_layer: list[list[int]] = field(default_factory=list)
    cached_per_layer: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    pos: list[Tensor] = field(default_factory=list)
    all_pos: list[Tensor] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    image_rows: list[int] = field(default_factory=list)
    grids: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)
    encoded: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = field(default_factory=list)
    projected: list[int | None] = field(default_factory=list)
    placed: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    chosen: list[list[Selection]] = field(default_factory=list)
    index: Tensor | None = None
    positions: str = "original"
    prefix: int = 0
    ignored_labels: int = 0
    selection_per_row: list[int] = field(default_factory=list)
    ahead: list[tuple[int, list[int]]] = field(default_factory=list)
    selection_seconds: float = 0.0
    unstored: int = 0
    cache: CacheTrace | None = None

    @property
    def selection_macs(self) -> int:
        """Multiply-adds spent on scores and selection, whole batch."""
        return sum(self.selection_per_row)

    def spend(self, row: int, macs: int) -> None:
        """Count what scores and selection cost a sample."""
        missing = row + 1 - len(self.selection_per_row)
        self.selection_per_row += [0] * missing
        self.selection_per_row[row] += macs

    @property
    def mean_tokens(self) -> list[float]:
        """Visual tokens averaged over the layers, one number per sample."""
        return [sum(row) / len(row) for row in self.tokens_per_layer]

    @property
    def slots(self) -> list[Tensor]:
        """One per image: the slot that stands for each of its tokens, -1 where dropped, ``[N]``."""
        found = []
        for image, count in enumerate(self.num_tokens):
            whole = self.whole(image)
            found.append(torch.arange(count) if whole is None else whole.dest()[0])
        return found

    def whole(self, image: int) -> Selection | None:
        """All selections of an image as one; ``None``: there was none."""
        whole: Selection | None = None
        for selection in self.chosen[image]:
            whole = selection if whole is None else whole.then(selection)
        return whole

    def __str__(self) -> str:
        if self.model == "vit":
            return "\n".join(
                f"picture {number}: patches per layer {row}, {len(kept)} left of {total}"
                for number, (row, kept, total) in enumerate(
                    zip(self.tokens_per_layer, self.kept, self.num_tokens, strict=True)
                )
            )
        lines = [f"positions: {self.positions}"]
        for row, (visual, stored) in enumerate(
            zip(self.tokens_per_layer, self.stored_per_layer, strict=True)
        ):
            lines.append(f"sample {row}: visual tokens per layer {visual}, slots stored {stored}")
        for row, layers in enumerate(self.cache.slots if self.cache is not None else ()):
            lines.append(f"sample {row}: slots per layer and head after eviction {layers}")
        lines += [f"stage {number}: {stage}" for number, stage in enumerate(self.stages)]
        return "\n".join(lines)
