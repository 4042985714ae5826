# SPDX-License-Identifier: Apache-2.0
"""The pictures of a data set: encoded bytes and labels by number, wherever they lie."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod

import numpy as np
from PIL import Image, UnidentifiedImageError

from visprune.errors import ConfigError
from visprune.eval.tasks.base import SampleError
from visprune.eval.tasks.loading import decode

_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile),
    Image.DecompressionBombError,
)


class CorruptPicture(ConfigError):
    """A picture that cannot be read; the message names it."""


class Pictures(ABC):
    """Pictures with labels.

    Attributes:
        where: What they were opened from, for messages.
        classes: Names of the classes; a label is a place in this list.
        labels: ``[N]`` of int64.
    """

    where: str
    classes: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """What a user would look for to find picture ``index``."""

    @abstractmethod
    def data(self, index: int) -> bytes | np.ndarray:
        """The encoded file, or its pixels ``[H, W, 3]`` as uint8."""

    def read(self, index: int) -> Image.Image:
        """Picture ``index`` in RGB, upright and scaled as evaluation shows it.

        Raises:
            CorruptPicture: It cannot be read.
        """
        try:
            data = self.data(index)
            if isinstance(data, np.ndarray):
                return Image.fromarray(data).convert("RGB")
            return decode(io.BytesIO(data), self.name(index))
        except SampleError as error:
            why: object = error.__cause__
            if isinstance(why, UnidentifiedImageError):  # its message holds an address in memory
                why = "it is no picture"
            raise CorruptPicture(f"Cannot read {self.name(index)}: {why}.") from error
        except _BROKEN as error:
            raise CorruptPicture(f"Cannot read {self.name(index)}: {error}.") from error
