# SPDX-License-Identifier: Apache-2.0
"""Tasks on published data sets: rows from the Hub, from a copy of it, or from the usual files."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from visprune.errors import ConfigError
from visprune.eval.tasks.base import Sample, Task, check_option
from visprune.eval.tasks.loading import LazySamples, Unreachable, as_stored
from visprune.eval.tasks.rows import FileRows, HubRows, Rows, import_datasets

__all__ = ["DataTask", "numbered"]


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """Base of the tasks on published data.

    Args:
        split: one of the task's splits.
        data: where the data is. ``None``: the Hub, by the name lmms-eval uses; ``"owner/name"``:
            another data set there of the same columns; a folder: files in the layout that the
            task's docstring names, a copy of the Hub's repository, or ``save_to_disk`` output.
        orient: turn pictures as their EXIF data say, as ``datasets`` and so lmms-eval do; LLaVA's
            own scripts show them as they are stored.
    """

    HUB: ClassVar[str] = ""
    CONFIG: ClassVar[str | None] = None
    SPLITS: ClassVar[Mapping[str, str]] = {}  # ours -> the Hub's
    UNSCORED: ClassVar[Sequence[str]] = ()  # splits whose answers a server keeps
    COLUMNS: ClassVar[Sequence[str]] = ()
    TEXTS: ClassVar[Sequence[str]] = ()  # columns that hold a text in every row
    LAYOUT: ClassVar[str] = ""  # what a folder should hold, for messages

    split: str = ""
    data: str | None = None
    orient: bool = True

    def __post_init__(self) -> None:
        """Reject a split that the task does not have."""
        super().__post_init__()
        object.__setattr__(self, "data", None if self.data is None else str(self.data))
        check_option(self.name, "split", self.split, tuple(self.SPLITS))

    @property
    def scored(self) -> bool:
        """Whether the split's answers are public."""
        return self.split not in self.UNSCORED

    @abstractmethod
    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        """Build the sample of a row."""

    def _files(self, folder: Path) -> FileRows | None:
        """Read the usual files; ``None`` where the folder does not hold them."""
        return None

    def _wanted(self, rows: Rows) -> list[int]:
        """Return the rows that belong to the task."""
        return list(range(len(rows)))

    def _check(self, rows: Rows, wanted: Sequence[int]) -> None:
        """Refuse rows that cannot be asked or scored, before the first of them is asked.

        Raises:
            ConfigError: a column does not hold what it should; names the row.
        """
        for name in self.TEXTS:
            values = rows.column(name)
            for number in wanted:
                if not isinstance(values[number], str):
                    raise ConfigError(
                        f"{rows.place(number)}: {name} is a text, got {values[number]!r:.80}."
                    )

    def _names(self, rows: Rows) -> list[str]:
        """Return the id of each row; repeated ones are numbered."""
        return [str(value) for value in rows.column("question_id")]

    def _groups(self, rows: Rows, names: Sequence[str]) -> Sequence[str]:
        """Return for each row what it must stay together with."""
        return names

    def samples(self) -> Sequence[Sample]:
        """Return the samples in the order of the file.

        Raises:
            ConfigError: the data is not there, or has other columns or values; the message says
                what to do.
        """
        rows = self._rows()
        if not len(rows):
            raise ConfigError(f"{self.name} ({self.split}) has no rows in {self._where}.")
        rows.require(self.COLUMNS)
        wanted = self._wanted(rows)
        if not wanted:
            raise ConfigError(f"No row in {self._where} belongs to {self.name} ({self.split}).")
        self._check(rows, wanted)
        names = numbered(self._names(rows))
        groups = self._groups(rows, names)
        chosen = [wanted[i] for i in self._chosen([groups[i] for i in wanted])]
        return LazySamples(lambda number: self._turned(number, names[number], rows), chosen)

    def _turned(self, number: int, name: str, rows: Rows) -> Sample:
        sample = self._sample(number, name, rows)
        if self.orient:
            return sample
        return dataclasses.replace(sample, image=as_stored(sample.image))

    @property
    def _where(self) -> str:
        return self.data or self.HUB

    def _folder(self) -> Path | None:
        """Return where the data lies here; ``None``: on the Hub.

        Raises:
            ConfigError: a path that is not there.
        """
        if self.data is None or Path(self.data).exists():
            return None if self.data is None else Path(self.data)
        if self.data.count("/") != 1 or self.data[0] in "./~":
            raise ConfigError(f"{self.name}: there is no folder {self.data}. {self._help}")
        return None

    def _rows(self) -> Rows:
        folder = self._folder()
        if folder is None:
            name = self.data or self.HUB
            return HubRows(self._from_hub(name), name)
        found = self._files(folder)
        if found is not None:
            return found
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            return HubRows(self._from_disk(folder), str(folder))
        if any(folder.rglob("*.parquet")):
            return HubRows(self._from_hub(str(folder)), str(folder))
        raise ConfigError(f"{self.name}: {folder} does not hold the data. {self._help}")

    @property
    def _help(self) -> str:
        layout = f" holding {self.LAYOUT}," if self.LAYOUT else ""
        return f"data is a folder{layout} or a copy of the Hub's {self.HUB}."

    def _from_disk(self, folder: Path) -> Any:
        datasets = import_datasets()
        found = datasets.load_from_disk(str(folder))
        if not isinstance(found, datasets.DatasetDict):
            return found
        hub_split = self.SPLITS[self.split]
        if hub_split not in found:
            raise ConfigError(
                f"{self.name}: {folder} has no split {hub_split!r}; it has {', '.join(found)}."
            )
        return found[hub_split]

    def _from_hub(self, name: str, config: str | None = None) -> Any:
        """Load the split through ``datasets``; it keeps to its cache where it is told to.

        Raises:
            Unreachable: the Hub cannot be reached, and the cache does not hold it.
            ConfigError: no such configuration or split.
        """
        datasets = import_datasets()
        config, split = config or self.CONFIG, self.SPLITS[self.split]
        try:
            return datasets.load_dataset(name, config, split=split)
        except ValueError as error:  # what datasets raises for unknown configurations and splits
            raise ConfigError(f"{self.name}: {name} ({split}): {error}") from error
        except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
            offline = [key for key in _OFFLINE if os.environ.get(key, "0") not in ("", "0")]
            why = f" {offline[0]} is set and the cache does not hold it." if offline else ""
            raise Unreachable(
                f"{self.name}: cannot load {name} ({split}): {error}.{why} Where there is a "
                f"network, `hf download --repo-type dataset {self.HUB} --local-dir DIR`, then "
                f"data=DIR. {self._help}"
            ) from error


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def numbered(names: Sequence[str]) -> list[str]:
    """Return names with ``#2``, ``#3`` on those that came before: ids must be unique."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out
