# SPDX-License-Identifier: Apache-2.0
"""Kimi K2.5: a clip comes as chunks of a few frames, each behind the time at which it begins."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.backbones.vlm.join import join
from visprune.backbones.vlm.picture import ImageLayout, Picture

_LONGEST = len("00:00:00.000")


class ChunksAdapter(GenericAdapter):
    """A family whose encoder makes one entry of each chunk of a clip, averaged over its frames.

    Chunks are written ``00:00:02.000<begin>video<content>...<end>``, and nothing tells the model
    which of them are of one clip. They are where they are of one size, nothing but the time stands
    between them, as short as in all of the prompt, and where time goes on: a clip begins anew with
    the time that the one before it began with. All chunks but the last hold as many frames.
    """

    def piece(
        self, count: int, pixels: Tensor | None, cells: tuple[int, int, int] | None, kind: Kind
    ) -> Picture:
        """A picture or a chunk, whose frames the encoder sees as one, one below the other."""
        made = super().piece(count, pixels, cells, kind)
        if cells is None:
            return made
        t, h, w = cells
        return replace(made, grids=((1, t * h, w),))

    def joined(self, call: dict[str, Any], layouts: list[ImageLayout]) -> list[ImageLayout]:
        """Put the chunks of a clip together; ``t`` of a token is the number of its chunk."""
        ids = call.get("input_ids")
        if ids is None:  # merged by hand: the marks are gone
            return layouts
        clips = [one for one in layouts if one.picture.kind == "video"]
        times = {id(one): self._time(ids, one) for one in clips}
        behind = [pair for pair in pairwise(clips) if pair[0].row == pair[1].row]
        gaps = [self._between(ids, one, other) for one, other in behind]
        usual = min((len(gap) for gap in gaps if gap is not None), default=0)
        first: dict[int, ImageLayout] = {}  # of the clip that a chunk belongs to

        def of_one_clip(one: ImageLayout, other: ImageLayout) -> bool:
            start = first.setdefault(id(one), one)
            gap = self._between(ids, one, other)
            first_rows, rows, later = (x.picture.grids[0][1] for x in (start, one, other))
            alike = one.picture.extent == other.picture.extent and first_rows == rows >= later
            if not alike or gap is None or len(gap) != usual:
                return False
            # A token before the time at most, as a line's end, tells nothing: no two chunks of a
            # clip lie whole hours apart.
            told = gap[1:] if len(gap) > 1 else gap
            if times[id(start)][-len(told) :] == told:
                return False
            first[id(other)] = start
            return True

        return join(layouts, of_one_clip)

    def _time(self, ids: Tensor, chunk: ImageLayout) -> list[int]:
        """The tokens before a chunk's begin, of which the last are its time."""
        start = int(chunk.positions[0])
        before = ids[chunk.row, max(0, start - 2 * _LONGEST) : start].tolist()
        mark = self.config.vision_start_token_id
        if mark not in before:
            return []
        return before[: len(before) - 1 - before[::-1].index(mark)]

    def _between(self, ids: Tensor, one: ImageLayout, other: ImageLayout) -> list[int] | None:
        """What stands between the end of a chunk and the next one's begin, where that is short."""
        start, stop = int(one.positions[-1]) + 1, int(other.positions[0])
        begin, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        gap = ids[one.row, start:stop].tolist() if stop - start <= 2 * _LONGEST else []
        if gap[:1] != [end] or gap.count(begin) != 1 or end in gap[1:]:
            return None
        gap = gap[1 : gap.index(begin)]
        return gap if 0 < len(gap) <= _LONGEST else None
