# SPDX-License-Identifier: Apache-2.0
"""Files of a folder replaced together: a kill leaves the old ones or the new, and all others stay.

New files are written into a hidden folder inside the target, on the same disk. Renaming that folder
is the step that counts: before it the old files stand, after it the new ones, which move to their
places one by one (``os.replace``). Whoever reads or writes the folder next finishes a move that was
killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import IO

from visprune.errors import ConfigError

__all__ = ["finish", "replace_files"]

_WRITING, _READY, _LOCK, _GONE = ".visprune-writing-", ".visprune-ready", "lock", ".gone"


def replace_files(
    target: Path, write: Callable[[Path], None], *, owned: Collection[str] = ()
) -> None:
    """Write files into a folder, in the place of those of the same names.

    Args:
        target: The folder; made if it is not there.
        write: Writes the files into the empty folder that it is given.
        owned: Names that are removed from ``target`` where ``write`` makes no such file.

    Raises:
        OSError: They cannot be written. What was there is whole.
        ConfigError: A file that would be read in place of the new ones is not ours to remove.
    """
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    finish(target)
    _sweep(target)
    fresh, lock = _new_folder(target)
    try:
        with lock:
            content = fresh / "files"
            content.mkdir()
            write(content)
            _spare(target, content)
            for name in owned:
                if not (content / name).exists():
                    (content / f"{name}{_GONE}").touch()
            for path in _files(content):
                _to_disk(path)
            _commit(content, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        if made:
            with suppress(OSError):
                target.rmdir()
        raise
    shutil.rmtree(fresh, ignore_errors=True)
    finish(target)


def finish(target: Path) -> None:
    """Move the files of a finished writing to their places, where that was killed.

    Raises:
        ConfigError: They cannot be moved.
    """
    ready = target / _READY
    if not ready.is_dir():
        return
    try:
        for path in _files(ready):
            place = target / path.relative_to(ready)
            with suppress(FileNotFoundError):  # another process has moved it meanwhile
                if path.name.endswith(_GONE):
                    place.with_name(path.name.removesuffix(_GONE)).unlink(missing_ok=True)
                    path.unlink()
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, place)
    except OSError as error:
        raise ConfigError(
            f"Writing {str(target)!r} was killed, and the new files, which are whole, cannot be "
            f"moved there: {error.strerror or error}. Move what is in {str(ready)!r} by hand."
        ) from error
    shutil.rmtree(ready, ignore_errors=True)


def _commit(content: Path, target: Path) -> None:
    """Make the new files count; another process may have done the same a moment before."""
    while True:
        try:
            os.rename(content, target / _READY)
            return
        except OSError:
            if not (target / _READY).is_dir():
                raise
            finish(target)


def _spare(target: Path, content: Path) -> None:
    """Refuse what would end badly, and leave a model card that is there as it is."""
    if (target / "README.md").exists():
        (content / "README.md").unlink(missing_ok=True)
    new = {path.relative_to(content) for path in _files(content)}
    for name in new:
        if (target / name).is_dir():
            raise ConfigError(f"{str(target / name)!r} is a folder; a file of that name is needed.")
    names = {str(name) for name in new}
    sharded = "model.safetensors.index.json" in names
    for other in ("adapter_config.json", *(["model.safetensors"] if sharded else [])):
        if other not in names and (target / other).exists():
            raise ConfigError(
                f"{str(target)!r} holds a {other}, which would be read in place of the model that "
                f"is to be saved. Save it in another folder, or remove that file."
            )


def _files(folder: Path) -> list[Path]:
    """All files, in one order; what says which method is in force comes last."""
    found = [path for path in folder.rglob("*") if not path.is_dir()]
    return sorted(found, key=lambda path: (path.name.startswith("visprune."), path))


def _to_disk(path: Path) -> None:
    """A rename may reach the disk before the data does."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _new_folder(target: Path) -> tuple[Path, IO[str]]:
    """A folder to write in, and the lock, held, that says that this is going on."""
    while True:
        fresh = Path(tempfile.mkdtemp(prefix=_WRITING, dir=target))
        try:
            lock = (fresh / _LOCK).open("w")
        except FileNotFoundError:  # swept away by another process before it was locked
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fresh, lock


def _sweep(target: Path) -> None:
    """Remove what killed writings left: folders of ours that nobody holds the lock of."""
    for left in target.glob(f"{_WRITING}????????"):  # 8: what mkdtemp adds
        with suppress(OSError):
            left.rmdir()  # killed before there was a lock, or after it was gone
        with suppress(OSError), (left / _LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
