# SPDX-License-Identifier: Apache-2.0
"""Read what an image encoder and a projector cost from their modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from visprune.backbones.cost.attention import attention_macs, find_attention
from visprune.backbones.cost.matrices import convolution, matrix_weights, token_macs
from visprune.cost.layers import Encoder, EncoderLayer, Projector
from visprune.errors import UnsupportedModel

# Tokens that stand before the patches of every frame.
_PREFIX = re.compile(r"(class_embedding|cls_token|reg_token|register_tokens|cls_register_token)$")


def read_encoder(tower: nn.Module, projectors: Sequence[nn.Module] = ()) -> Encoder:
    """Count an image encoder.

    Args:
        tower: The encoder.
        projectors: What maps its tokens to the decoder's, where that lies inside ``tower``: counted
            by :func:`read_projector`, and so are modules of the same class beside it.

    Raises:
        UnsupportedModel: It holds what cannot be counted.
    """
    name, blocks = stack(tower)
    layers = tuple(_layer(block, _side(tower, number)) for number, block in enumerate(blocks))
    skipped = {id(m) for part in _projecting(tower, projectors) for m in part.modules()}
    skipped |= {id(m) for m in blocks.modules()}
    patch, pooled, pooled_token = _outside(tower, skipped)
    prefix = sum(
        weight.numel() // weight.shape[-1]
        for path, weight in tower.named_parameters()
        if _PREFIX.search(path) and not path.startswith(f"{name}.")
    )
    return Encoder(layers, patch, prefix, pooled=pooled, pooled_token=pooled_token)


def read_projector(
    projectors: Sequence[nn.Module],
    tower: nn.Module | None = None,
    *,
    merge: int = 1,
    keeps_cls: bool = False,
) -> Projector:
    """Count what stands between encoder and decoder, for each token that comes out.

    Args:
        projectors: Its modules; each works on what comes out, as a merger of blocks does.
        tower: The encoder, in which there may be more modules of their classes (Qwen3-VL's
            mergers of earlier layers).
        merge: Side of the block of patches that becomes one token.
        keeps_cls: The class token is projected too.

    Raises:
        UnsupportedModel: It holds what cannot be counted, or attends.
    """
    parts = _projecting(tower, projectors)
    for part in parts:
        if find_attention(part) is not None or any(
            isinstance(m, nn.MultiheadAttention) for m in part.modules()
        ):
            raise UnsupportedModel(
                f"The projector {type(part).__name__} attends; its cost by token is not known."
            )
    macs = sum(token_macs(part) for part in parts)
    return Projector(macs_per_token=macs, merge=merge, keeps_cls=keeps_cls)


def _projecting(tower: nn.Module | None, projectors: Sequence[nn.Module]) -> list[nn.Module]:
    """The projectors, and others of their classes inside the encoder."""
    found = {id(part): part for part in projectors}
    if tower is not None:
        found |= {id(part): part for part in _joining(tower)}
    inside = {} if tower is None else {id(part): part for part in tower.modules()}
    kinds = {type(part) for part in projectors if id(part) in inside}
    # A bare nn.Linear or nn.Sequential says nothing about what others of its class are.
    kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.")}
    found |= {key: part for key, part in inside.items() if type(part) in kinds}
    return list(found.values())


def _joining(tower: nn.Module) -> list[nn.Module]:
    """Convolutions behind the layers that make one token of a block of patches (GLM-4V)."""
    if not getattr(tower, "spatial_merge_size", None):
        return []
    block = (tower.spatial_merge_size,) * 2
    own = ((part, vars(part)) for part in tower.children())
    return [part for part, has in own if has.get("kernel_size") == has.get("stride") == block]


def stack(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of layers, by name: the one whose every module attends, or convolves (LFM3)."""
    found: dict[str, nn.ModuleList] = {}
    for name, part in tower.named_modules():
        if not isinstance(part, nn.ModuleList) or not len(part):
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if all(find_attention(block) or _convolving(block) for block in part):
            found[name] = part
    if len(found) != 1:
        raise UnsupportedModel(
            f"{type(tower).__name__} has {len(found)} stacks of layers that attend"
            f"{': ' + ', '.join(found) if found else ''}; its cost is known for one."
        )
    return next(iter(found.items()))


def _convolving(block: nn.Module) -> nn.Module | None:
    """What mixes the tokens of a layer by a gated convolution over their grid."""
    for part in block.modules():
        own = dict(part.named_children())
        if "in_proj" in own and any(isinstance(child, nn.Conv2d) for child in own.values()):
            return part
    return None


def _layer(block: nn.Module, window: int | None) -> EncoderLayer:
    module = find_attention(block)
    if module is None:
        mixing = token_macs(_convolving(block) or block)
        return EncoderLayer(mixing, token_macs(block) - mixing, 0)
    if window is None and getattr(module, "window_size", None):
        raise UnsupportedModel(
            f"{type(module).__name__} attends in windows of {module.window_size}, which are not "
            f"counted."
        )
    attention = attention_macs(module)
    rest = token_macs(block) - attention.whole
    return EncoderLayer(attention.token, rest, attention.pair, window)


def _side(tower: Any, layer: int) -> int | None:
    """Side in patches of the windows of one layer (Qwen2.5-VL, Muse); ``None``: it has none."""
    full = getattr(tower, "fullatt_block_indexes", None)
    if full is None:
        kinds = getattr(getattr(tower, "config", None), "layer_types", None) or ()
        full = [n for n, kind in enumerate(kinds) if kind != "window_attention"]
        if len(full) == len(kinds):
            return None
    if layer in full:
        return None
    # window_size is in pixels; the model cuts windows on the merged grid, rounding down.
    merge = int(tower.spatial_merge_size)
    return int(tower.window_size) // merge // int(tower.patch_size) * merge


def _outside(tower: nn.Module, skipped: set[int]) -> tuple[int, int, int]:
    """What is done outside the layers: by patch, and in a pooling head once and by token."""
    embeddings: dict[str, int] = {}
    pooled = pooled_token = 0
    unknown = []
    for name, part in tower.named_modules():
        if id(part) in skipped:
            continue
        if isinstance(getattr(part, "attention", None), nn.MultiheadAttention):
            once, each = _pooling(part)
            pooled, pooled_token = pooled + once, pooled_token + each
            skipped = skipped | {id(m) for m in part.modules()}
            continue
        macs = convolution(part) if convolution(part) is not None else _linear(part)
        if not macs:
            continue
        if "patch" in name or "embed" in name:
            embeddings[name] = macs
        else:
            unknown.append(name)
    if unknown or len(embeddings) > 1:
        what = ", ".join(unknown or embeddings)
        raise UnsupportedModel(
            f"On how many tokens {what} of {type(tower).__name__} works is not known, so its cost "
            f"is not. Outside the layers, one patch embedding and SigLIP's pooling are counted."
        )
    return sum(embeddings.values()), pooled, pooled_token


def _linear(part: nn.Module) -> int:
    """Multiply-adds of a linear layer; of a block of several, nothing: each is looked at."""
    return 0 if list(part.children()) else matrix_weights(part)


def _pooling(head: Any) -> tuple[int, int]:
    """SigLIP's pooling: one learned query attends to all tokens, then an MLP."""
    width = int(head.attention.embed_dim)
    once = 2 * width * width + matrix_weights(head.mlp)  # the query's and the output's projection
    return once, 2 * width * width + 2 * width  # keys and values, and both products
