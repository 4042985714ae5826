# SPDX-License-Identifier: Apache-2.0
"""DeepStack: features of more encoder layers, added to the visual tokens between decoder layers.

The decoder adds them by a mask of the sequence that it was called with. Where tokens leave at a
layer that mask fits no more, so the features are taken out of the call and added by whoever knows
which tokens are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def take_out(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Take DeepStack features out of the arguments of a decoder.

    Args:
        kwargs: ``inputs_embeds`` ``[B, S, D]`` and, with pictures, ``visual_pos_masks`` ``[B, S]``
            and ``deepstack_visual_embeds`` (one ``[N, D]`` of all visual tokens for each of the
            first layers, added behind it).

    Returns:
        The arguments without them, and by layer what is added to the states that enter it,
        ``[B, S, D]``, zero where there is text.
    """
    given = dict(kwargs)
    features = given.get("deepstack_visual_embeds")
    mask = given.get("visual_pos_masks")
    if features is None or mask is None:
        return given, {}
    given["deepstack_visual_embeds"] = given["visual_pos_masks"] = None
    embeds = given["inputs_embeds"]
    found = {number + 1: _spread(one, mask, embeds) for number, one in enumerate(features)}
    return given, found


def take_before(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """The same of a decoder that adds features before its layers, by layer.

    Args:
        kwargs: ``inputs_embeds`` ``[B, S, D]`` and, with pictures, ``vision_mask`` ``[B, S, 1]``
            and ``deepstack_features``, a dict of layers to ``[N, D]``.
    """
    given = dict(kwargs)
    features, mask = given.get("deepstack_features"), given.get("vision_mask")
    if features is None or mask is None:
        return given, {}
    given["deepstack_features"] = given["vision_mask"] = None
    embeds = given["inputs_embeds"]
    return given, {n: _spread(one, mask[..., 0], embeds) for n, one in features.items()}


def _spread(features: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """Features of the visual tokens in the places of the sequence."""
    zeros = torch.zeros_like(like)
    places = mask.to(like.device)[..., None].expand_as(like)
    return zeros.masked_scatter(places, features.to(like.device, like.dtype))
