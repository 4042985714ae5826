# SPDX-License-Identifier: Apache-2.0
"""Put the pieces of a picture together: tiles and a thumbnail, as a person counts pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.picture import ImageLayout, Picture
from visprune.core.signals.base import PictureSignal


def join(
    layouts: Sequence[ImageLayout], one_picture: Callable[[ImageLayout, ImageLayout], Any]
) -> list[ImageLayout]:
    """Join each piece to the one before it where they are of one picture.

    Args:
        layouts: pieces in the order of the sequence.
        one_picture: whether two of them that follow one another in a row are.
    """
    groups: list[list[ImageLayout]] = []
    for layout in layouts:
        before = groups[-1][-1] if groups else None
        if before is not None and before.row == layout.row and bool(one_picture(before, layout)):
            groups[-1].append(layout)
        else:
            groups.append([layout])
    return [_joined(group) for group in groups]


def _joined(group: list[ImageLayout]) -> ImageLayout:
    if len(group) == 1:
        return group[0]
    positions = torch.cat([layout.positions for layout in group])
    return ImageLayout(_picture([x.picture for x in group]), group[0].row, positions)


def _picture(pieces: list[Picture]) -> Picture:
    """One picture of several; t goes on from piece to piece."""
    pos, first = [], 0
    for piece in pieces:
        pos.append(piece.pos + torch.tensor([first, 0, 0], device=piece.pos.device))
        first += piece.extent[0] + 1
    shared = set.intersection(*(set(piece.signals) for piece in pieces))
    signals = {
        signal: _of_all(signal, [piece.signals[signal] for piece in pieces]) for signal in shared
    }
    return Picture(
        free=torch.cat([piece.free for piece in pieces]),
        pos=torch.cat(pos),
        source=_cat([piece.source for piece in pieces]),
        pixels=None,
        kind=pieces[0].kind,
        grids=tuple(cells for piece in pieces for cells in piece.grids),
        signals=signals,
        alive=_alive(pieces),
        size=_cat([piece.size for piece in pieces]),
        placed=pieces[0].placed,
        encoded=_encoded(pieces),
        projected=_sum([piece.projected for piece in pieces]),
    )


def _encoded(pieces: list[Picture]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What the encoder was given of all, where it is known of all."""
    each = [piece.encoded for piece in pieces if piece.encoded is not None]
    if len(each) < len(pieces):
        return None
    frames = tuple(count for own, _ in each for count in own)
    return frames, tuple(count for _, own in each for count in own)


def _sum(counts: list[int | None]) -> int | None:
    there = [count for count in counts if count is not None]
    return sum(there) if len(there) == len(counts) else None


def _alive(pieces: list[Picture]) -> Tensor | None:
    """Which tokens of all stand for those that are left inside the encoder."""
    found, first = [], 0
    for piece in pieces:
        found.append(None if piece.alive is None else piece.alive + first)
        first += len(piece.pos)
    return _cat(found)


def _of_all(signal: Any, values: list[Any]) -> Any:
    if isinstance(signal, PictureSignal):
        return signal.joined(values)
    return torch.cat(values)


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    alike = len({part.shape[1:] for part in there}) == 1
    return torch.cat(there) if len(there) == len(parts) and alike else None
