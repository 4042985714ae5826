# SPDX-License-Identifier: Apache-2.0
"""Reading questions and pictures: local files, and data sets of the Hub through ``datasets``."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.tasks.base import Sample, SampleError

__all__ = [
    "ImageFile",
    "LazySamples",
    "Unreachable",
    "as_stored",
    "decode",
    "find_file",
    "jsonl_lines",
    "open_image",
    "picture_size",
    "read_json",
    "read_object",
    "read_rows",
    "read_text",
    "require_columns",
    "to_rgb",
]


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file; calling it loads it.

    Args:
        path: the file.
        owner: what asks for it, for messages (``"question 17"``).
        orient: turn it as its EXIF data say.
    """

    path: Path
    owner: str = ""
    orient: bool = True

    def __call__(self) -> Image.Image:
        """Return the picture, RGB.

        Raises:
            SampleError: the file is missing or is no picture that Pillow reads.
        """
        return open_image(self.path, self.owner, self.orient)


def as_stored(picture: Callable[[], Image.Image]) -> Callable[[], Image.Image]:
    """Return what loads a picture without turning it.

    Args:
        picture: an :class:`ImageFile`, or a partial call that takes ``orient``.
    """
    if isinstance(picture, ImageFile):
        return dataclasses.replace(picture, orient=False)
    takes_orient: Callable[..., Image.Image] = picture
    return functools.partial(takes_orient, orient=False)


def open_image(path: Path, owner: str = "", orient: bool = True) -> Image.Image:
    """Load a picture whole, RGB.

    Args:
        path: the file.
        owner: what asks for it, for messages.
        orient: turn it as its EXIF data say.

    Raises:
        SampleError: the file is missing or is no picture that Pillow reads; names the file.
    """
    of = f" of {owner}" if owner else ""
    if not path.is_file():
        raise SampleError(f"The picture{of} is missing: {path}.")
    return decode(path, f"{path}{of}", orient)


class Unreachable(ConfigError):
    """Data, a model or a device that another machine may have; nothing is wrong with the study."""


# What Pillow raises on damaged files, also a byte away from a size of gigabytes: that one is an
# Exception of its own, which would end the whole run.
_DAMAGED = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, RuntimeError,
            Image.DecompressionBombError)  # fmt: skip


def decode(source: Path | IO[bytes], where: str, orient: bool = True) -> Image.Image:
    """Decode a picture whole, RGB.

    Samples of more than 8 bits are scaled (see :func:`to_rgb`).

    Args:
        source: the file or its bytes.
        where: its name, for messages.
        orient: turn it as its EXIF data say: a phone's photo lies on its side without.

    Raises:
        SampleError: it is no picture that Pillow reads, it is cut short, or its values cannot be
            shown; names ``where``.
    """
    try:
        with Image.open(source) as picture:
            turn = _TURNS.get(_orientation(picture)) if orient else None
            picture.load()
            shown = to_rgb(picture)
            return shown if turn is None else shown.transpose(turn)
    except _DAMAGED as error:
        raise SampleError(f"The picture cannot be read: {where} ({error}).") from error


def picture_size(source: Path | IO[bytes], where: str, orient: bool = True) -> tuple[int, int]:
    """Return width and height of a picture in pixels, from its header: nothing is decoded.

    Args:
        source: the file or its bytes.
        where: its name, for messages.
        orient: of the picture as it is shown, turned as its EXIF data say.

    Raises:
        SampleError: it is no picture that Pillow reads; names ``where``.
    """
    try:
        with Image.open(source) as picture:
            if picture.format == "TIFF":
                picture.load()  # which turns it
            width, height = picture.size
            return (height, width) if orient and _orientation(picture) >= 5 else (width, height)
    except _DAMAGED as error:
        raise SampleError(f"The picture cannot be read: {where} ({error}).") from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(picture: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 (as it lies) where there is none that can be read."""
    if picture.format == "TIFF":
        return 1  # Pillow turns these by itself when it loads them
    try:
        # Not picture.getexif(): of a PNG, that decodes the picture to find EXIF data behind it.
        found = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    except (*_DAMAGED, struct.error, LookupError, TypeError):
        return 1  # the picture itself may be whole
    return found if found in _TURNS else 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB, one of 16 or 32 bits a pixel scaled; Pillow would cut at 255.

    Values that 8 bits hold stay; floats from 0 to 1 are shares of white; of everything else the
    picture's darkest becomes black and its brightest white (a depth map or an X-ray uses a part of
    what its format could hold).

    Raises:
        ValueError: it holds one value beyond 8 bits, or some that are not finite.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    values = np.asarray(picture).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("its values are not all finite numbers")
    if picture.mode == "F" and low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    elif low >= 0.0 and high <= 255.0:
        low, high = 0.0, 255.0
    elif low == high:
        raise ValueError(f"every pixel of its {picture.mode} values is {low:g}")
    scaled = (values - low) * (255.0 / (high - low))
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


class LazySamples(Sequence[Sample]):
    """Samples that are made when they are asked for, so that 200,000 rows stay rows.

    Args:
        make: builds the sample of a row number.
        rows: row numbers, in order.
    """

    def __init__(self, make: Callable[[int], Sample], rows: Sequence[int]) -> None:
        self._make, self._rows = make, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> LazySamples: ...
    def __getitem__(self, index: int | slice) -> Sample | LazySamples:
        if isinstance(index, slice):
            return LazySamples(self._make, self._rows[index])
        return self._make(self._rows[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._make, self._rows)


def jsonl_lines(path: Path, needed: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return ``("FILE, line N", object)`` for each line of a JSONL; empty lines are skipped.

    Args:
        path: the file.
        needed: columns that every line has; see :func:`require_columns`.

    Raises:
        ConfigError: no such file, a line that is not a JSON object (says which), or no line.
    """
    rows = []
    # Not splitlines(): it also breaks at U+2028, which JSON leaves inside strings.
    for number, line in enumerate(read_text(path, "utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is not a JSON object: {line[:80]}.")
        require_columns(row, needed, where)
        rows.append((where, row))
    if not rows:
        raise ConfigError(f"{path} holds no line.")
    return rows


def require_columns(
    row: Mapping[str, Any], needed: Sequence[str], where: str, nullable: Sequence[str] = ()
) -> None:
    """Refuse a row that lacks a column, or has null there.

    Args:
        row: the row.
        needed: its columns.
        where: file and line, or file and id, for messages.
        nullable: columns that may be null.

    Raises:
        ConfigError: it is no JSON object, or a column is missing (says which it has) or null.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is {_shape(row)}, not an object; needed: {', '.join(needed)}.")
    missing = [name for name in needed if name not in row]
    if missing:
        hints = "".join(did_you_mean(name, row) for name in missing)
        raise ConfigError(
            f"{where} has no column {', '.join(map(repr, missing))}.{hints} "
            f"It has: {', '.join(map(str, row)) or 'none'}; needed: {', '.join(needed)}."
        )
    for name in needed:
        if row[name] is None and name not in nullable:
            raise ConfigError(f"{where}: {name} is null; give it a value, or take the row out.")


def find_file(folder: Path, *names: str) -> Path | None:
    """Return the first of several relative paths (patterns allowed) that exists in a folder."""
    for name in names:
        found = sorted(folder.glob(name))
        if found:
            return found[0]
    return None


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Read a text file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding=encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: it cannot be read.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {_shape(value)}, not an object; take the published file.")
    return value


def read_rows(
    path: Path, needed: Sequence[str], under: str = ""
) -> list[tuple[str, dict[str, Any]]]:
    """Return ``("FILE, row N", object)`` for each object of a JSON list; the first is row 0.

    Args:
        path: the file.
        needed: columns that every row has; see :func:`require_columns`.
        under: key of the list in the file's object; ``""``: the file is the list.

    Raises:
        ConfigError: it cannot be read, holds no such list, or a row lacks a column (says which).
    """
    value = read_object(path) if under else read_json(path)
    listed = value.get(under) if under else value
    if not isinstance(listed, list):
        what = f"no list {under!r}" if under else "no list"
        raise ConfigError(f"{path} holds {what}: it is {_shape(value)}; take the published file.")
    rows = [(f"{path}, row {number}", row) for number, row in enumerate(listed)]
    for where, row in rows:
        require_columns(row, needed, where)
    return rows


def _shape(value: Any) -> str:
    """Say what a JSON value is: ``a list``, ``an object of split, data``, ``the value null``."""
    if isinstance(value, Mapping):
        return f"an object of {', '.join(map(str, list(value)[:5])) or 'nothing'}"
    return "a list" if isinstance(value, list) else f"the value {json.dumps(value)[:40]}"
