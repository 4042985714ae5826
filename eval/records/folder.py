# SPDX-License-Identifier: Apache-2.0
"""The results folder: a study, its cells, their records, and what they ran on.

::

    study.json                        the study, resolved
    cells/<cell>.json                 one per model x method x task x seed
    records-<host>-<pid>-<rank>.jsonl one line per sample, append-only
    environments/<id>.json            command, versions, hardware, date
    speed/<cell>.json                 latency by part
    pictures/<hash>.jpg               small copies, for the report
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visprune.errors import ConfigError
from visprune.eval.environment import writable_folder
from visprune.eval.records.files import RecordsWriter, read_lines
from visprune.eval.records.place import check_results
from visprune.eval.records.record import Cell, Record, canonical, merge

__all__ = ["ResultsFolder", "read_records", "write_json"]

_PICTURE_SIDE = 448
_WAY_OUT = (
    "Delete this one file: the records lie elsewhere and are kept, and the same `visprune eval` "
    "command writes it again."
)


class ResultsFolder:
    """Everything in one results folder.

    Args:
        path: the folder.
        create: make it if it is not there, and prove that it takes files.

    Raises:
        ConfigError: it is not there, is no results folder, or cannot be written.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path)
        if create:
            writable_folder(self.path)
            for name in ("cells", "environments", "pictures", "speed"):
                (self.path / name).mkdir(exist_ok=True)
        else:
            check_results(path)

    # Reading ---------------------------------------------------------------------------------

    @property
    def study(self) -> dict[str, Any]:
        """What ``study.json`` holds; empty where there is none."""
        path = self.path / "study.json"
        return _read_json(path) if path.is_file() else {}

    def cells(self) -> dict[str, Cell]:
        """The study's cells by id, in its order; without a study, all that are there.

        A cell that the study does not list was part of an earlier one, and was never asked.
        """
        found = self._all_cells()
        listed = self.study.get("cells")
        if listed is None:
            return found
        return {name: found[name] for name in listed if name in found}

    def _all_cells(self) -> dict[str, Cell]:
        paths = sorted(self.path.glob("cells/*.json"))
        return {cell.id: cell for cell in (Cell.from_dict(_read_json(path)) for path in paths)}

    def record_files(self) -> list[Path]:
        """All files of records, sorted by name."""
        return sorted(self.path.glob("records*.jsonl"))

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every complete line of every records file, as written: repeats are not collapsed."""
        for path in self.record_files():
            for _, values in read_lines(path):
                yield values

    def records(self, cell: str | None = None) -> list[Record]:
        """One record per (cell, sample), sorted by both.

        Args:
            cell: id of a cell; ``None``: all cells.

        Raises:
            ConfigError: a file is damaged, or holds records of a cell that the folder does not
                know: it came from another run.
        """
        return merge(self._known(self._all_cells(), cell))

    def _known(self, known: Mapping[str, Cell], cell: str | None) -> Iterator[Record]:
        for path in self.record_files():
            for _, values in read_lines(path):
                if values["cell"] not in known:
                    raise ConfigError(
                        f"{str(path)!r} holds records of the cell {values['cell']!r}, which "
                        f"{str(self.path)!r} does not know: it came from another run. Move it out."
                    )
                if cell is None or values["cell"] == cell:
                    yield Record.from_dict(values)

    def environments(self) -> dict[str, dict[str, Any]]:
        """What processes ran on, by id."""
        paths = sorted(self.path.glob("environments/*.json"))
        return {path.stem: _read_json(path) for path in paths}

    def speed(self) -> dict[str, dict[str, Any]]:
        """Latency by part, by cell."""
        return {path.stem: _read_json(path) for path in sorted(self.path.glob("speed/*.json"))}

    def picture(self, name: str | None) -> Path | None:
        """The copy of a record's picture, if there is one."""
        path = self.path / "pictures" / f"{name}.jpg"
        return path if name and path.is_file() else None

    # Writing ---------------------------------------------------------------------------------

    def writer(self, rank: int = 0) -> RecordsWriter:
        """Open a records file for this process."""
        return RecordsWriter(self.path, rank)

    def add_cells(self, cells: Iterable[Cell]) -> None:
        """Write the cells that are not there yet, or were there with another limit."""
        for cell in cells:
            path = self.path / "cells" / f"{cell.id}.json"
            if not path.is_file() or Cell.from_dict(_read_json(path)).task != cell.task:
                write_json(path, cell.to_dict())

    def add_environment(self, described: Mapping[str, Any]) -> str:
        """Write what this process runs on; returns its id."""
        name = hashlib.sha256(canonical(dict(described))).hexdigest()[:16]
        write_json(self.path / "environments" / f"{name}.json", dict(described))
        return name

    def add_speed(self, cell: str, measured: Mapping[str, Any]) -> None:
        """Write the latency of a cell, in place of an older one."""
        write_json(self.path / "speed" / f"{cell}.json", {"cell": cell, **measured})

    def add_picture(self, image: Any, digest: str) -> str:
        """Write a small copy (long side at most 448) of a picture; returns its name.

        Args:
            image: a PIL image in RGB.
            digest: hex hash of its pixels.
        """
        name = digest[:16]
        path = self.path / "pictures" / f"{name}.jpg"
        if not path.is_file():
            small = image.copy()
            small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
            with _replacing(path) as fresh:
                small.convert("RGB").save(fresh, "JPEG", quality=88)
        return name


def read_records(path: str | Path, cell: str | None = None) -> list[Record]:
    """One record per (cell, sample) of a results folder, sorted; see :class:`ResultsFolder`."""
    return ResultsFolder(path).records(cell)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a kill or a power cut leaves the old file or the new one, whole.

    Raises:
        ConfigError: it cannot be written.
    """
    with _replacing(path) as fresh:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # A lone surrogate (a broken byte of a file name) becomes the same escape in JSON.
        with fresh.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            # A name may reach the disk before what it names: after a power cut, an empty file.
            os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write, which takes the place of ``path`` at the end."""
    fresh = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        yield fresh
        os.replace(fresh, path)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {str(path)!r}: {error.strerror or error}. What was written before is "
            f"safe; mend it (a full disk?) and run the same command again."
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as JSON: {error}. {_WAY_OUT}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r} holds no JSON object. {_WAY_OUT}")
    return values
