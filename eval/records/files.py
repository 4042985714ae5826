# SPDX-License-Identifier: Apache-2.0
"""Files of records: append-only, one JSON line each, safe against a kill at any moment."""

from __future__ import annotations

import errno
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from visprune.errors import ConfigError
from visprune.eval.records.record import VERSION, Record

__all__ = ["RecordsWriter", "read_lines"]

_SYNC_SECONDS = 1.0


class RecordsWriter:
    """Appends records to a file of its own, ``records-<host>-<pid>-<rank>.jsonl``.

    A line is with the operating system once :meth:`write` returns, so that killing the process
    loses nothing; it is on the disk at most a second later, or after :meth:`sync`.

    Args:
        folder: the results folder.
        rank: number of this process among those of one launch.

    Attributes:
        path: the file; ``None`` until something is written.
        count: records written.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder, self.rank = Path(folder), rank
        self.path: Path | None = None
        self.count = 0
        self._file = -1
        self._synced = time.monotonic()

    def _open(self) -> int:
        """Make a file that no other process has.

        Process ids come again, above all in containers; and a file that is there may end in a torn
        line, which nothing must be appended to.
        """
        host = "".join(c if c.isalnum() or c in "-_" else "-" for c in os.uname().nodename)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        for number in itertools.count():
            again = f"-{number}" if number else ""
            path = self.folder / f"records-{host}-{os.getpid()}-{self.rank}{again}.jsonl"
            try:
                file = os.open(path, flags, 0o644)
            except FileExistsError:
                continue
            except OSError as error:
                raise _cannot_write(path, error, self.count) from error
            break
        self.path = path
        return file

    def write(self, records: Iterable[Record]) -> None:
        """Append records.

        Raises:
            ConfigError: the disk is full or fails. What was written before is safe; a line that was
                cut is ignored by every reader.
        """
        records = list(records)
        data = memoryview(b"".join(record.line() for record in records))
        if not data:
            return
        if self._file < 0:
            self._file = self._open()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise _cannot_write(self.path, error, self.count) from error
        self.count += len(records)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring everything to the disk.

        Raises:
            ConfigError: the disk fails.
        """
        try:
            if self._file >= 0:
                os.fsync(self._file)
        except OSError as error:
            raise _cannot_write(self.path, error, self.count) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Bring everything to the disk and close the file."""
        if self._file < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cannot_write(path: Path | None, error: OSError, count: int) -> ConfigError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full else (error.strerror or str(error))
    return ConfigError(
        f"Cannot write {str(path)!r}: {why}. The {count} records that this process had written are "
        f"safe; {'free some space' if full else 'mend it'} and run the same command again."
    )


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset behind the line, its JSON) for each complete line of a records file.

    A last line without an end was cut by a kill or a full disk (or is being written): it is left
    out, and its sample counts as not done.

    Args:
        path: the file.
        start: offset to begin at, the beginning of a line.

    Raises:
        ConfigError: a complete line is no record, or one of a later version.
    """
    with path.open("rb") as file:
        file.seek(start)
        for raw in file:  # split at \n alone, never at other line ends within a text
            if not raw.endswith(b"\n"):
                return
            start += len(raw)
            yield start, _parse(path, start - len(raw), raw)


def _parse(path: Path, offset: int, raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not {"v", "cell", "sample"} <= values.keys():
        raise ConfigError(
            f"{str(path)!r}: the line at byte {offset} is no record: {raw[:60]!r}. The file was "
            f"damaged or is of another kind; move it out of the folder (its samples are then asked "
            f"again)."
        )
    if values["v"] != VERSION:
        raise ConfigError(
            f"{str(path)!r} holds records of version {values['v']!r}; this visprune reads "
            f"{VERSION}."
        )
    return values
