# SPDX-License-Identifier: Apache-2.0
"""Draw tokens by a picture's pixels, as operators that a graph holds without looking inside."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def checksum(picture: Tensor) -> int:
    """A number below 2 ** 32 that depends on the values in float32 alone."""
    data = picture.detach().to("cpu", torch.float32).contiguous()
    return zlib.crc32(data.numpy().tobytes())


@torch.library.custom_op("visprune::picture_checksum", mutates_args=())
def picture_checksum(pixels: Tensor) -> Tensor:
    """The :func:`checksum` of each picture of a batch, int64 ``[B]``, on the CPU."""
    return torch.tensor([checksum(picture) for picture in pixels], dtype=torch.int64)


@picture_checksum.register_fake
def _(pixels: Tensor) -> Tensor:
    return torch.empty(pixels.shape[0], dtype=torch.int64)


@torch.library.custom_op("visprune::draw_tokens", mutates_args=())
def draw_tokens(fingerprints: Tensor, num_tokens: int, num_keep: int, seed: int) -> Tensor:
    """Draw ``num_keep`` of ``num_tokens`` without replacement for each picture.

    Args:
        fingerprints: what each draw starts from besides ``seed``, int64 ``[B]``.
        num_tokens: N.
        num_keep: K.
        seed: of all.

    Returns:
        int64 ``[B, K]`` on the CPU, in the order drawn.
    """
    drawn = torch.empty(len(fingerprints), num_keep, dtype=torch.int64)
    for row, fingerprint in enumerate(fingerprints.tolist()):
        generator = torch.Generator().manual_seed((seed + fingerprint) % 2**63)
        drawn[row] = torch.randperm(num_tokens, generator=generator)[:num_keep]
    return drawn


@draw_tokens.register_fake
def _(fingerprints: Tensor, num_tokens: int, num_keep: int, seed: int) -> Tensor:
    return torch.empty(fingerprints.shape[0], num_keep, dtype=torch.int64)
