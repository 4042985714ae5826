# SPDX-License-Identifier: Apache-2.0
"""How much an image encoder looks at a patch, with or without a class token."""

from __future__ import annotations

from torch import Tensor

from visprune.core import Context, ModelSpec
from visprune.core.signals import ClsAttention, EncoderSignal, ReceivedAttention
from visprune.core.signals.base import EncoderLayer


def saliency(spec: ModelSpec, layer: EncoderLayer = "feature") -> EncoderSignal:
    """The signal that :func:`attended` reads on a model."""
    if spec.why_not("cls_token") is None:
        return ClsAttention(layer)
    return ReceivedAttention(layer)


def attended(ctx: Context, layer: EncoderLayer = "feature") -> Tensor:
    """Attention to each patch, mean over heads, ``[B, N]``.

    That of the class token; of an encoder without one, the mean over all patches.
    """
    of_class = ctx.get(ClsAttention(layer))
    heads: Tensor = ctx[ReceivedAttention(layer)] if of_class is None else of_class
    return heads.mean(dim=1)
