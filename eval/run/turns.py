# SPDX-License-Identifier: Apache-2.0
"""Which questions share a cache: neighbours about one picture, so many at most."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["blocks_between", "by_picture", "dialogues"]


def dialogues(pictures: Sequence[str], turns: int) -> list[list[int]]:
    """Return the numbers of the samples that share a cache, in the order in which they are asked.

    A picture's first dialogue is shorter in two of three pictures (for three turns), so that a kind
    of question that comes at the same place of every picture comes in every turn. Which turn a
    sample is depends on those before it alone: more samples change none.

    Args:
        pictures: the picture of each sample; samples about one lie next to each other.
        turns: samples of a dialogue, at most.
    """
    found: list[list[int]] = []
    picture = place = -1
    for number, name in enumerate(pictures):
        if number == 0 or name != pictures[number - 1]:
            picture, place = picture + 1, 0
        if place == 0 or (place - picture) % turns == 0:
            found.append([])
        found[-1].append(number)
        place += 1
    return found


def blocks_between(spans: Sequence[range], pictures: Sequence[str]) -> list[range]:
    """Return blocks that end where a picture does: no dialogue is cut."""
    found, start = [], 0
    for span in spans:
        end = max(span.stop, start)
        while 0 < end < len(pictures) and pictures[end] == pictures[end - 1]:
            end += 1
        if end > start:
            found.append(range(start, end))
        start = end
    return found


def by_picture(pictures: Sequence[str]) -> list[list[int]]:
    """Return the places of samples that are about one picture, together."""
    found: dict[str, list[int]] = {}
    for place, picture in enumerate(pictures):
        found.setdefault(picture, []).append(place)
    return list(found.values())
