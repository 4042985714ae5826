# SPDX-License-Identifier: Apache-2.0
"""Files by relative name: in a folder, in a zip, in an uncompressed tar."""

from __future__ import annotations

import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visprune.errors import ConfigError, did_you_mean

__all__ = ["EXTENSIONS", "Files", "FolderFiles", "TarFiles", "ZipFiles"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Files(ABC):
    """Files by relative name, in a folder or an archive."""

    names: list[str]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file."""


class FolderFiles(Files):
    """All files below a folder; ``folders`` are the sub-folders, empty ones too."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = [
            (Path(where) / name).relative_to(root).as_posix()
            for where, _, names in os.walk(root, followlinks=True)
            for name in names
        ]
        self.folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())

    def read(self, name: str) -> bytes:
        """See :class:`Files`."""
        return (self.root / name).read_bytes()


class ArchiveFiles(Files):
    """An archive; each process opens it for itself, since a shared file position is nobody's."""

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self._opened: tuple[int, Any] | None = None
        try:
            members = self.members()
        except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
            raise ConfigError(f"{str(path)!r} is not an archive that can be read: {error}.") from (
                error
            )
        self.prefix = _prefix(members, split, path)
        self.names = [m[len(self.prefix) :] for m in members if m.startswith(self.prefix)]

    @abstractmethod
    def members(self) -> list[str]:
        """Names of the files in it."""

    @abstractmethod
    def open(self) -> Any:
        """Open it."""

    def handle(self) -> Any:
        """The archive as this process opened it."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self.open())
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class ZipFiles(ArchiveFiles):
    """A ``.zip``."""

    def open(self) -> Any:
        """See :class:`ArchiveFiles`."""
        return zipfile.ZipFile(self.path)

    def members(self) -> list[str]:
        """See :class:`ArchiveFiles`."""
        return [info.filename for info in self.handle().infolist() if not info.is_dir()]

    def read(self, name: str) -> bytes:
        """See :class:`Files`."""
        return self.handle().read(self.prefix + name)


class TarFiles(ArchiveFiles):
    """An uncompressed ``.tar``; compressed ones cannot be read in any order."""

    def open(self) -> Any:
        """See :class:`ArchiveFiles`."""
        return tarfile.open(self.path, "r:")

    def members(self) -> list[str]:
        """See :class:`ArchiveFiles`."""
        self.places = {
            m.name: (m.offset_data, m.size) for m in self.handle().getmembers() if m.isfile()
        }
        return list(self.places)

    def read(self, name: str) -> bytes:
        """See :class:`Files`."""
        offset, size = self.places[self.prefix + name]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _prefix(members: Sequence[str], split: str, path: Path) -> str:
    """``"train/"``, or ``"NAME/train/"`` where everything lies in one folder NAME."""
    if not split:
        return ""
    tops = {m.partition("/")[0] for m in members}
    pictures = [m for m in members if m.lower().endswith(EXTENSIONS)]
    for among in (pictures, members):  # __MACOSX/train/ and the like hold no pictures
        for prefix in (f"{split}/", *(f"{top}/{split}/" for top in sorted(tops))):
            if any(m.startswith(prefix) for m in among):
                return prefix
    raise ConfigError(
        f"{str(path)!r} holds no folder {split!r}.{did_you_mean(split, tops)} "
        f"At its top: {', '.join(sorted(tops)[:8]) or 'nothing'}."
    )
