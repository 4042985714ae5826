# SPDX-License-Identifier: Apache-2.0
"""Pictures that are looked at several times in a row: read once, hashed once, copied once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from PIL import Image

from visprune.eval.models.held import Held
from visprune.eval.records.folder import ResultsFolder

__all__ = ["Album", "Shot", "picture_hash"]

_ROOM = 2**28  # bytes of pixels


@dataclass
class Shot:
    """A picture.

    Attributes:
        image: its pixels.
        digest: hash of them.
        copy: name of its small copy, once there is one.
    """

    image: Image.Image
    digest: str
    copy: str | None = None


class Album:
    """The pictures of a few samples, for all cells that ask about them.

    Args:
        folder: where small copies are kept; ``None``: nowhere.
        opened: called with every picture that was read.
    """

    def __init__(
        self, folder: ResultsFolder | None = None,
        opened: Callable[[Image.Image], None] = lambda image: None,
    ) -> None:  # fmt: skip
        self._folder, self._opened = folder, opened
        self._shots: Held[Shot] = Held(_ROOM, _bytes)

    def look(self, load: Callable[[], Image.Image]) -> Shot:
        """Return a sample's picture.

        Loaders that are equal (those of questions about one picture, where a task's loaders are
        values) are called once.
        """

        def make() -> Shot:
            image = load()
            self._opened(image)
            return Shot(image, picture_hash(image))

        return self._shots.get(_key(load), make)

    def copy(self, shot: Shot) -> str | None:
        """Keep a small copy for the report; returns its name.

        Raises:
            ConfigError: it cannot be written.
        """
        if shot.copy is None and self._folder is not None:
            shot.copy = self._folder.add_picture(shot.image, shot.digest)
        return shot.copy

    def clear(self) -> None:
        """Drop everything."""
        self._shots.forget()


def _key(load: Callable[[], Image.Image]) -> Hashable:
    """The loader itself: it is alive as long as it is a key, so that no other can be taken for it.

    Its type counts too: loaders of two kinds may be equal by their values.
    """
    try:
        hash(load)
    except TypeError:
        return object()
    return type(load), load


def _bytes(shot: Shot) -> int:
    width, height = shot.image.size
    return width * height * len(shot.image.getbands())


def picture_hash(image: Image.Image) -> str:
    """SHA-256 of a picture's size and pixels (hex)."""
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
