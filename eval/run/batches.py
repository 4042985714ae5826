# SPDX-License-Identifier: Apache-2.0
"""Which samples are asked together: blocks in their order, and within them batches by length."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["batches_of", "blocks_of"]

_PADDING = 256  # tokens that are nothing beside a picture's
_BLOCK = 64  # samples, or four batches where those are large


def blocks_of(count: int, batch_size: int) -> list[range]:
    """The numbers of so many samples, block by block."""
    size = batch_size * max(4, _BLOCK // batch_size)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Places in a block, cut into batches of about the same length.

    A batch whose prompts are all of one length needs no padding, and no mask: it is worth more than
    a full one. Each length makes such batches as far as they are at least half full; what is left
    of all lengths is asked together, in order of length; a prompt that is much longer is not.

    Args:
        lengths: of the block's prompts.
        batch_size: of a batch, at most.
    """
    alike: dict[int, list[int]] = {}
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        alike.setdefault(lengths[place], []).append(place)
    batches: list[list[int]] = []
    left: list[int] = []
    for places in alike.values():
        for part in _parts(places, batch_size):
            if 2 * len(part) >= batch_size:
                batches.append(part)
            else:
                left += part
    return batches + _near(left, lengths, batch_size)


def _parts(places: list[int], size: int) -> list[list[int]]:
    """Cut a list into parts of a size; the last is what remains."""
    return [places[start : start + size] for start in range(0, len(places), size)]


def _near(places: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut places in order of length into parts, in which nothing is padded to a multiple of it."""
    parts: list[list[int]] = []
    for place in places:
        full = not parts or len(parts[-1]) == size
        if full or lengths[place] > 2 * lengths[parts[-1][0]] + _PADDING:
            parts.append([])
        parts[-1].append(place)
    return parts
