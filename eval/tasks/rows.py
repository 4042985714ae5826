# SPDX-License-Identifier: Apache-2.0
"""Rows of published data sets: from files, or from a table of the Hub's ``datasets``."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.tasks.base import SampleError
from visprune.eval.tasks.loading import (
    ImageFile,
    decode,
    open_image,
    picture_size,
    require_columns,
)

__all__ = ["FileRows", "HubRows", "ImageLoader", "Rows", "import_datasets"]

ImageLoader = Callable[[], Image.Image]


class Rows(Protocol):
    """Rows of a data set: text columns at once, pictures when they are called for."""

    def __len__(self) -> int:
        """Count the rows."""

    def column(self, name: str) -> list[Any]:
        """Return one text column."""

    def row(self, number: int) -> Mapping[str, Any]:
        """Return the text columns of a row."""

    def picture(self, number: int) -> ImageLoader:
        """Return what loads the picture of a row."""

    def place(self, number: int) -> str:
        """Return where a row stands, for messages; without a line or id, the first is row 0."""

    def require(self, needed: Sequence[str]) -> None:
        """Raise ``ConfigError`` unless every row has these columns; names the first without."""


@dataclass(frozen=True)
class FileRows:
    """Rows read from files.

    Attributes:
        rows: in the Hub's columns.
        files: the picture of each row, or what loads it.
        places: file and line, or file and id, of each row.
    """

    rows: Sequence[Mapping[str, Any]]
    files: Sequence[Path | ImageLoader]
    places: Sequence[str] = ()

    @classmethod
    def of(cls, found: Iterable[tuple[str, Mapping[str, Any], Path | ImageLoader]]) -> FileRows:
        """Build them from the place, the columns and the picture of each row."""
        listed = list(found)
        return cls([row for _, row, _ in listed], [file for _, _, file in listed],
                   [place for place, _, _ in listed])  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """Return one text column."""
        return [row[name] for row in self.rows]

    def row(self, number: int) -> Mapping[str, Any]:
        """Return the text columns of a row."""
        return self.rows[number]

    def picture(self, number: int) -> ImageLoader:
        """Return what loads the picture of a row."""
        file = self.files[number]
        return ImageFile(file, self.place(number)) if isinstance(file, Path) else file

    def place(self, number: int) -> str:
        """Return where a row stands, for messages."""
        return self.places[number] if self.places else f"row {number}"

    def require(self, needed: Sequence[str]) -> None:
        """Raise ``ConfigError`` unless every row has these columns."""
        for number, row in enumerate(self.rows):
            require_columns(row, needed, self.place(number))


@dataclass(frozen=True)
class HubRows:
    """Rows of a ``datasets.Dataset``; pictures stay bytes until they are called for.

    Attributes:
        data: the data set, with an ``image`` column.
        name: for messages.
    """

    data: Any
    name: str

    @functools.cached_property
    def _text(self) -> Any:
        # A table of questions alone (GQA's) has no picture column.
        return self.data.remove_columns([name for name in ("image",) if name in self.data.features])

    @functools.cached_property
    def _sizes(self) -> dict[int, tuple[int, int]]:
        return {}

    @functools.cached_property
    def _encoded(self) -> Any:
        datasets = import_datasets()
        data = self.data.select_columns("image")
        feature = data.features["image"]
        plain = datasets.Image(decode=False)
        # SEED-Bench: a list of pictures, the frames of a video.
        listed = isinstance(feature, list) or hasattr(feature, "feature")
        return data.cast_column("image", datasets.List(plain) if listed else plain)

    def __len__(self) -> int:
        return len(self.data)

    def column(self, name: str) -> list[Any]:
        """Return one text column."""
        return list(self._text[name][:])  # without the slice, datasets reads row by row

    def row(self, number: int) -> Mapping[str, Any]:
        """Return the text columns of a row."""
        return self._text[number]

    def picture(self, number: int) -> ImageLoader:
        """Return what loads the picture of a row."""
        return functools.partial(_decode_row, self, number)

    def place(self, number: int) -> str:
        """Return where a row stands, for messages."""
        return f"{self.name}, row {number}"

    def require(self, needed: Sequence[str], *, pictures: bool = True) -> None:
        """Raise ``ConfigError`` unless the table has these columns, and one of pictures."""
        columns = [*needed, "image"] if pictures else needed
        require_columns(dict.fromkeys(self.data.features, ""), columns, self.name)

    def size(self, number: int, orient: bool = True) -> tuple[int, int]:
        """Return width and height of a row's picture, read once, from its header.

        Args:
            number: the row.
            orient: as the picture is shown, turned as its EXIF data say.

        Raises:
            SampleError: there is no picture, or none that Pillow reads.
        """
        if number not in self._sizes:
            source, where = self._source(number), self.place(number)
            self._sizes[number] = picture_size(source, where, orient)
        return self._sizes[number]

    def picture_id(self, number: int) -> str:
        """Return what two rows share that have the same picture: where a table does not name it."""
        source = self._source(number)
        data = source.read_bytes() if isinstance(source, Path) else source.read()
        return hashlib.sha256(data).hexdigest()[:16]

    def _source(self, number: int) -> Path | IO[bytes]:
        """Return the file of a row's picture or its bytes; of several pictures the first."""
        value = self._encoded[number]["image"]
        encoded = value[0] if isinstance(value, list) and value else value
        if not encoded:
            raise SampleError(f"{self.place(number)} has no picture.")
        if encoded["bytes"] is None:
            return Path(encoded["path"])
        return io.BytesIO(encoded["bytes"])


def _decode_row(rows: HubRows, number: int, orient: bool = True) -> Image.Image:
    source, where = rows._source(number), rows.place(number)
    if isinstance(source, Path):
        return open_image(source, where, orient)
    return decode(source, where, orient)


def import_datasets() -> Any:
    """Return the module ``datasets``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "This data is read by the package datasets: pip install 'visprune[eval]'."
        ) from error
