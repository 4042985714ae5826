# SPDX-License-Identifier: Apache-2.0
"""The count of an encoder that loses tokens on the way, to hold against what papers print."""

from __future__ import annotations

from collections.abc import Iterable

from visprune.cost.cost import VisionShape
from visprune.cost.macs import _encoder_layer, per_layer


def encoder_macs(
    shape: VisionShape,
    tokens_per_layer: int | Iterable[int],
    mlp_tokens_per_layer: int | Iterable[int] | None = None,
    *,
    patches: int = 0,
) -> int:
    """Multiply-adds of an encoder that loses tokens on the way (one picture, no windows).

    Args:
        shape: The encoder.
        tokens_per_layer: Tokens, CLS included, that enter each layer's attention.
        mlp_tokens_per_layer: Tokens that enter each layer's MLP, where a method drops or merges
            tokens between the two (ToMe, EViT); ``None``: the same.
        patches: Patches that were embedded; 0 leaves the patch embedding out.
    """
    assert not shape.windowed_layers, "who shares a window would depend on positions"
    tokens = per_layer("tokens_per_layer", tokens_per_layer, shape.num_layers)
    mlp = tokens
    if mlp_tokens_per_layer is not None:
        mlp = per_layer("mlp_tokens_per_layer", mlp_tokens_per_layer, shape.num_layers)
    embedding = patches * shape.patch_dim * shape.hidden_size
    return embedding + sum(
        _encoder_layer(shape, n, n * n, k) for n, k in zip(tokens, mlp, strict=True)
    )
