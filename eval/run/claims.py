# SPDX-License-Identifier: Apache-2.0
"""Who asks which samples: any number of processes on one folder, none of which waits for a message.

A process that wants a sample locks one byte of the cell's lock file: whatever batches it and others
form, no sample is asked twice. The operating system gives the byte back when the process ends,
however it ends, so that a crash stops nobody and what the crashed process had claimed is taken by
another. What is done is read from the records themselves.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from visprune.errors import ConfigError
from visprune.eval.records.files import RecordsWriter, read_lines
from visprune.eval.records.folder import ResultsFolder

__all__ = ["Claims", "Done", "Presence", "asked_hash", "exclusive", "lock_of", "own_first"]

_BUSY = (errno.EACCES, errno.EAGAIN)


class Claims:
    """The locks of one cell, one byte for each sample; see :func:`lock_of`.

    Two claims by one process do not exclude each other: a process runs one study at a time.

    Args:
        path: the lock file; made if it is not there, and never written to.

    Raises:
        ConfigError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"Cannot open {str(path)!r}: {error.strerror or error}.") from error

    def take(self, number: int) -> bool:
        """Claim a byte; false where another process holds it.

        Raises:
            ConfigError: the file system has no locks.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise _no_locks(self.path, error) from error
        return True

    def release(self, number: int) -> None:
        """Give it back."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)


class Presence:
    """That a process is at work on a folder, for others to see; gone when the process ends.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path) -> None:
        self._claims = Claims(path)

    def alone(self) -> bool:
        """Whether no other process is there."""
        return self._claims.take(0)

    def show(self) -> None:
        """Be there, beside others.

        Raises:
            ConfigError: the file system has no locks.
        """
        try:
            fcntl.lockf(self._claims._file, fcntl.LOCK_SH, 1, 0)
        except OSError as error:
            raise _no_locks(self._claims.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._claims.__exit__()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file alone, for the short time in which a shared file is read and replaced.

    Raises:
        ConfigError: it cannot be made, or the file system has no locks.
    """
    with Claims(path) as claims:
        try:
            fcntl.lockf(claims._file, fcntl.LOCK_EX, 1, 0)
        except OSError as error:
            raise _no_locks(path, error) from error
        yield


def _no_locks(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"Cannot lock {str(path)!r}: {error.strerror or error}. Processes share a results folder "
        f"through POSIX locks; put it where there are such (a local disk, or NFS with lockd)."
    )


def lock_of(sample: str) -> int:
    """The byte of a lock file that stands for a sample, by its name: a longer study has the same.

    Two names on one byte (of 10^18) would only wait for each other.
    """
    return int.from_bytes(hashlib.blake2b(sample.encode("utf-8", "surrogatepass"), digest_size=8)
                          .digest()) >> 2  # fmt: skip


def asked_hash(record: Mapping[str, Any]) -> int:
    """Hash of what was asked and what counts as right, within this process."""
    return hash((record.get("prompt"), *(record.get("answers") or ())))


def own_first(count: int, rank: int, world: int) -> list[int]:
    """Order in which a process goes through blocks or batches: its own share first.

    Then comes what others may have left.

    Args:
        count: how many there are.
        rank: number of this process.
        world: processes of this launch.
    """
    order = list(range(rank % world, count, world))
    for step in range(1, world):
        # From the end: their owners come from the beginning.
        order += reversed(range((rank + step) % world, count, world))
    return order


class Done:
    """Which samples have a record, kept up to date by reading what other processes append.

    Args:
        folder: the results folder.
        retry_errors: records with an error that are there now count as not done.

    Attributes:
        own: what this process writes; its file is not read back while this is set.
        marks: of cells that had records at the beginning: keys of the 1st, 2nd, 4th, 8th ... of
            them without an error, by sample.
    """

    def __init__(self, folder: ResultsFolder, *, retry_errors: bool = False) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}
        self._prompts: dict[str, dict[str, int | None]] = {}
        self._forgotten: set[str] = set()
        self._recorded: set[str] = set()
        self.own: RecordsWriter | None = None
        self.marks: dict[str, dict[str, str]] = {}
        self._retry, self._marking = retry_errors, True
        self.refresh()
        self._retry = self._marking = False

    def refresh(self) -> None:
        """Read what was appended since the last time."""
        for path in self._folder.record_files():
            seen = self._offsets.get(path, 0)
            if (self.own is not None and path == self.own.path) or path.stat().st_size <= seen:
                continue
            for end, values in read_lines(path, seen):
                self._offsets[path] = end
                if values["cell"] in self._forgotten:
                    continue
                failed = bool(values.get("error"))
                self._recorded.add(values["cell"])
                if not (failed and self._retry):
                    asked = None if failed else asked_hash(values)
                    known = self._prompts.setdefault(values["cell"], {})
                    known[values["sample"]] = asked
                    if self._marking and not failed and len(known).bit_count() == 1:
                        marks = self.marks.setdefault(values["cell"], {})
                        marks[values["sample"]] = str(values.get("key"))

    def samples(self, cell: str) -> dict[str, int | None]:
        """Samples of a cell that have a record, with :func:`asked_hash` of each (no error)."""
        return self._prompts.setdefault(cell, {})

    def cells(self) -> set[str]:
        """Cells that have a record of whatever kind."""
        return set(self._recorded)

    def count(self, cell: str) -> int:
        """How many samples of a cell have a record."""
        return len(self._prompts.get(cell, ()))

    def forget(self, cell: str) -> None:
        """A cell is complete: keep nothing of it in memory."""
        self._prompts.pop(cell, None)
        self._forgotten.add(cell)
