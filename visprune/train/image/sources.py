# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures on disk: class folders, archives of them, arrays, Hugging Face data sets.

What a source is follows from its form, never from the name of a data set.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from visprune.errors import ConfigError, did_you_mean
from visprune.train.image.drawn import DRAWN, DrawnPictures
from visprune.train.image.files import EXTENSIONS, Files, FolderFiles, TarFiles, ZipFiles
from visprune.train.image.pictures import Pictures
from visprune.train.image.recipe import DataConfig

__all__ = ["open_pictures"]


def open_pictures(config: DataConfig, part: str) -> Pictures:
    """Open the pictures of one part.

    Args:
        config: Where they are.
        part: ``train`` or ``val``.

    Returns:
        All of them, unread.

    Raises:
        ConfigError: There is nothing there, no picture in it (or in one of its classes), or only
            one class.
    """
    split = config.train if part == "train" else config.val
    if config.path.startswith(DRAWN):
        found: Pictures = DrawnPictures(config.path, split)
    elif config.path.startswith("hf:"):
        found = _hugging_face(config, split)
    else:
        found = _local(config, Path(config.path).expanduser(), split)
    if len(found) == 0:
        raise ConfigError(f"There is no picture in {found.where}.")
    if part == "train" and len(found.classes) < 2:
        raise ConfigError(
            f"{found.where} holds one class only, {found.classes}; classification needs two. "
            f"Expected one sub-folder of pictures per class."
        )
    empty = [
        found.classes[i]
        for i, n in enumerate(np.bincount(found.labels, minlength=len(found.classes)))
        if n == 0
    ]
    if empty and part == "train":
        raise ConfigError(f"No picture of class {', '.join(empty)} in {found.where}.")
    return found


def _local(config: DataConfig, path: Path, split: str) -> Pictures:
    if not path.exists():
        near = os.listdir(path.parent) if path.parent.is_dir() else []
        raise ConfigError(
            f"There is no data at {str(path)!r}.{did_you_mean(path.name, near)} "
            f"Give data.path=FOLDER with {split}/CLASS/PICTURE or {split}.npz, .zip, .tar or "
            f".parquet in it, an archive of class folders, hf:NAME of the Hub, or drawn:1200 for "
            f"pictures drawn by code."
        )
    if path.is_file():
        return _file(config, path, split)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _hugging_face(config, split)
    if (path / split).is_dir():
        return FolderPictures(FolderFiles(path / split), str(path / split))
    for suffix in (".npz", ".zip", ".tar", ".parquet"):
        if (path / f"{split}{suffix}").is_file():
            return _file(config, path / f"{split}{suffix}", "")
    raise ConfigError(
        f"{str(path)!r} holds no {split!r}: neither a folder of class folders nor {split}.npz, "
        f"{split}.zip, {split}.tar, {split}.parquet. It holds: {_listing(path)}."
    )


def _listing(path: Path) -> str:
    names = sorted(os.listdir(path))
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"


def _file(config: DataConfig, path: Path, split: str) -> Pictures:
    suffix = path.suffix.lower()
    where = f"{path}, {split}" if split else str(path)
    if suffix == ".npz":
        return ArrayPictures(path)
    if suffix == ".zip":
        return FolderPictures(ZipFiles(path, split), where)
    if suffix == ".tar":
        return FolderPictures(TarFiles(path, split), where)
    if suffix == ".parquet":
        return _hugging_face(config, split, path)
    raise ConfigError(
        f"Cannot tell what {str(path)!r} is. Known: class folders, .zip and uncompressed .tar of "
        f"them, .npz, .parquet, data sets saved by `datasets`, hf:NAME."
    )


class FolderPictures(Pictures):
    """One folder per class, as in torchvision's ImageFolder; folders below it count to it."""

    def __init__(self, files: Files, where: str) -> None:
        self.files, self.where = files, where
        found = sorted(n for n in files.names if "/" in n and n.lower().endswith(EXTENSIONS))
        folders = {name.partition("/")[0] for name in found}
        self.classes = sorted(folders | set(getattr(files, "folders", ())))
        number = {name: i for i, name in enumerate(self.classes)}
        self.members = found
        self.labels = np.array([number[n.partition("/")[0]] for n in found], dtype=np.int64)

    def name(self, index: int) -> str:
        """See :class:`Pictures`."""
        return f"{self.where}: {self.members[index]}"

    def data(self, index: int) -> bytes:
        """See :class:`Pictures`."""
        return self.files.read(self.members[index])


class ArrayPictures(Pictures):
    """An ``.npz`` file: ``images`` ``[N, H, W, 3]``, or encoded files one behind the other.

    Encoded: an array of bytes ``jpeg``, ``png`` or ``encoded`` and ``offsets`` ``[N + 1]``. Both
    with ``labels`` ``[N]``; names of the classes are the lines of ``classes.txt`` beside it.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{str(path)!r} cannot be read: {error}.") from error
        key = next((k for k in ("images", "jpeg", "png", "encoded") if k in arrays), None)
        if key is None or "labels" not in arrays or (key != "images" and "offsets" not in arrays):
            raise ConfigError(
                f"{str(path)!r} holds {', '.join(arrays) or 'nothing'}; expected `labels` and "
                f"`images`, or `labels`, `offsets` and one of `jpeg`, `png`, `encoded`."
            )
        self.pixels, self.offsets = arrays[key], arrays.get("offsets")
        self.labels = arrays["labels"].astype(np.int64)
        count = len(self.pixels) if self.offsets is None else len(self.offsets) - 1
        if count != len(self.labels) or (len(self.labels) and self.labels.min() < 0):
            raise ConfigError(f"{str(path)!r}: {count} pictures do not fit the labels.")
        listed = path.with_name("classes.txt")
        names = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else []
        names = [name.strip() for name in names if name.strip()]
        most = int(self.labels.max(initial=-1)) + 1
        self.classes = names if len(names) >= most else [str(i) for i in range(most)]

    def name(self, index: int) -> str:
        """See :class:`Pictures`."""
        return f"{self.where}: number {index}"

    def data(self, index: int) -> bytes | np.ndarray:
        """See :class:`Pictures`."""
        if self.offsets is None:
            return self.pixels[index]
        return self.pixels[self.offsets[index] : self.offsets[index + 1]].tobytes()


def _hugging_face(config: DataConfig, split: str, file: Path | None = None) -> Pictures:
    # Kept apart: `datasets` is not among the requirements of the package itself.
    from visprune.train.image.hugging_face import open_data_set

    return open_data_set(config, split, file)
