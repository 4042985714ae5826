# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8, 4 or 2 bits: codes, packed, with a scale and a zero for each group.

    zero = min of the group;  scale = (max - min) / (2^bits - 1);  code = round((x - zero) / scale)
    x^ = code * scale + zero,  so that  |x - x^| <= scale / 2  (and the rounding of the dtype)

A group is `group` slots of one channel (per channel, for keys: their outliers sit in channels) or
`group` channels of one slot (per token, for values). Codes lie in bytes along the channels: byte c
holds channels c, c + width, c + 2 width, ... with width = d * bits / 8, so that unpacking is one
shift of a whole part and no interleaving.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from visprune.kernels.common.precision import wide


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., d] below ``2 ** bits`` -> [..., d * bits / 8]."""
    parts = codes.chunk(8 // bits, -1)
    out = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        out |= part << bits * i
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack`."""
    mask = (1 << bits) - 1
    return torch.cat([packed >> bits * i & mask for i in range(8 // bits)], -1)


def _ranges(
    x: Tensor, group: int, per_channel: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Smallest and largest of every group of ``x`` [..., N, d]; 0 of a group without members."""
    low = high = x
    if valid is not None:
        low = x.masked_fill(~valid[..., None], torch.inf)
        high = x.masked_fill(~valid[..., None], -torch.inf)
    axis = -2 if per_channel else -1
    short = -x.shape[axis] % group  # members that the last group lacks
    room = (0, 0, 0, short) if per_channel else (0, short)
    low = pad(low, room, value=torch.inf).unflatten(axis, (-1, group)).amin(axis)
    high = pad(high, room, value=-torch.inf).unflatten(axis, (-1, group)).amax(axis)
    nobody = low > high  # NaN compares false, so it stays
    return low.masked_fill(nobody, 0.0), high.masked_fill(nobody, 0.0)


def _spread(t: Tensor, group: int, per_channel: bool, size: int) -> Tensor:
    """A value per group -> a value per number."""
    axis = -2 if per_channel else -1
    return t.repeat_interleave(group, axis).narrow(axis, 0, size)


def quantize(
    x: Tensor, bits: int, group: int, per_channel: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` [..., N, d] -> codes [..., N, d * bits / 8], scale and zero, of ``x``'s dtype.

    The zero is a member of the group, so it is exact in that dtype; the codes are those of the
    rounded scale. Slots outside ``valid`` [..., N] do not widen a range.
    """
    most = (1 << bits) - 1
    low, high = _ranges(x, group, per_channel, valid)
    scale = ((wide(high) - wide(low)) / most).to(x.dtype)
    size = x.shape[-2 if per_channel else -1]
    step = _spread(wide(scale), group, per_channel, size)
    step = step.masked_fill(step == 0, 1.0)  # all equal: the code is 0 and the zero is exact
    away = wide(x) - _spread(wide(low), group, per_channel, size)
    codes = (away / step).nan_to_num_(0.0).round_().clamp_(0, most).to(torch.uint8)
    return pack(codes, bits), scale, low


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, per_channel: bool
) -> Tensor:
    """The numbers that the codes stand for, in fp32 (fp64 for fp64 scales)."""
    scale, zero = wide(scale), wide(zero)
    numbers = unpack(codes, bits).to(scale.dtype)
    axis = -2 if per_channel else -1
    size = numbers.shape[axis]
    if size % group:  # the last group is smaller
        numbers *= _spread(scale, group, per_channel, size)
        numbers += _spread(zero, group, per_channel, size)
    else:
        grouped = numbers.unflatten(axis, (-1, group))
        grouped.mul_(scale.unsqueeze(axis)).add_(zero.unsqueeze(axis))
    return numbers
