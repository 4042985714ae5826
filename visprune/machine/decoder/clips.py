# SPDX-License-Identifier: Apache-2.0
"""Which pictures of a prompt are frames of one clip, where the model itself cannot know.

Processors of InternVL and SmolVLM write a clip as pictures with words between them ("Frame1: ..."),
and for Gemma 3 users do the same. In the prompt that is no other than pictures of a text; so it is
told: ``clip_frames=8`` (all pictures, eight a clip) or ``clip_frames=[1, 8]`` (a picture, then a
clip of eight frames).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial, update_wrapper
from typing import Any

from visprune.backbones.encoders.base import Instead
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.join import join
from visprune.backbones.vlm.picture import ImageLayout
from visprune.core.numeric import is_whole
from visprune.core.threads import PerThread
from visprune.errors import ConfigError

ARGUMENT = "clip_frames"

Told = int | Sequence[int]


class _Told(PerThread):
    """What is known of the call that is under way.

    Attributes:
        call: as a forward was told.
        generating: as the ``generate`` around it was told.
    """

    call: Told | None = None
    generating: Told | None = None


class ClipFrames:
    """Takes ``clip_frames`` out of the calls of one model, and puts frames together.

    Args:
        adapter: the model family.
    """

    def __init__(self, adapter: VLMAdapter) -> None:
        self._adapter = adapter
        self._told = _Told()

    def install(self) -> Any:
        """Stand in place of the model's ``generate``, which refuses what it does not know."""
        model = self._adapter.model
        wrapped = update_wrapper(partial(self._generate, model.generate), model.generate)
        return Instead(model, "generate", wrapped)

    def _generate(self, original: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's ``generate``."""
        before = self._told.generating
        self._told.generating = kwargs.pop(ARGUMENT, None)
        try:
            return original(*args, **kwargs)
        finally:
            self._told.generating = before

    def begins(self, kwargs: dict[str, Any]) -> None:
        """Take the argument out of those of the model, or of its core called by itself."""
        told = kwargs.pop(ARGUMENT, None)
        if told is not None:
            self._told.call = told

    def ends(self) -> None:
        """The call is over, also by an error."""
        self._told.call = None

    def joined(self, layouts: list[ImageLayout]) -> list[ImageLayout]:
        """Put frames of one clip together, as far as it was told which these are.

        Args:
            layouts: what a call shows.

        Raises:
            ConfigError: it was told of other pictures than there are, or of what are no frames.
        """
        told = self._told.generating if self._told.call is None else self._told.call
        if told is None or not layouts:
            return layouts
        pictures = [layout for layout in layouts if layout.picture.kind == "image"]
        clips = [layout for layout in layouts if layout.picture.kind == "video"]
        pictures.sort(key=lambda layout: (layout.row, int(layout.positions[0])))
        found = []
        repeated = self._told.call is None  # `generate` repeats pictures for its beams
        for group in _groups(told, pictures, repeated):
            found += group if len(group) == 1 else [_clip(group)]
        return [*found, *clips]


def _groups(told: Told, pictures: list[ImageLayout], repeated: bool) -> Iterator[list[ImageLayout]]:
    """The pictures of every clip, a picture by itself alone."""
    sizes = [told] if is_whole(told) else list(told) if isinstance(told, Sequence) else []
    if not sizes or not all(is_whole(size) and size >= 1 for size in sizes):
        raise ConfigError(
            f"{ARGUMENT} is the number of frames of every clip (8), or of each picture and clip of "
            f"the prompt in order ([1, 8]: a picture, then a clip of 8 frames); got {told!r}."
        )
    rows: dict[int, list[ImageLayout]] = {}
    for layout in pictures:
        rows.setdefault(layout.row, []).append(layout)
    if is_whole(told):
        for own in rows.values():
            if len(own) % sizes[0]:
                raise _mismatch(told, [len(row) for row in rows.values()])
            yield from (own[n : n + sizes[0]] for n in range(0, len(own), sizes[0]))
        return
    # Beams have rows of their own, with the pictures of their sample.
    beams = max(1, len(pictures) // sum(sizes)) if repeated else 1
    each, left = list(rows.values()), list(sizes)
    for number in range(0, len(each), beams):
        counts: list[int] = []
        while left and sum(counts) < len(each[number]):
            counts.append(left.pop(0))
        for row in each[number : number + beams]:
            if len(row) != sum(counts):
                raise _mismatch(told, [len(one) for one in each])
            first = 0
            for size in counts:
                yield row[first : first + size]
                first += size
    if left:
        raise _mismatch(told, [len(one) for one in each])


def _mismatch(told: Told, counts: list[int]) -> ConfigError:
    return ConfigError(
        f"{ARGUMENT}={told!r} does not fit the pictures of this call: its samples show "
        f"{', '.join(map(str, counts))}. Frames of a clip stand in one sample; the numbers of all "
        f"pictures and clips, in order, add up to the pictures there are."
    )


def _clip(frames: list[ImageLayout]) -> ImageLayout:
    """Frames as one clip: ``t`` of a token is the number of its frame."""
    for number, frame in enumerate(frames):
        tiles = frame.picture.extent[0] + 1
        if tiles == 1:
            continue
        raise ConfigError(
            f"{ARGUMENT}: frame {number} of a clip is cut into {tiles} "
            f"tiles, which are no frames. Give the frames whole: as videos to the processor, or "
            f"with its tiling off."
        )
    (whole,) = join(frames, lambda one, other: True)
    return ImageLayout(replace(whole.picture, kind="video"), whole.row, whole.positions)
