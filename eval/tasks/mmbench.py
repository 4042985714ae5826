# SPDX-License-Identifier: Apache-2.0
"""MMBench: lettered questions, asked under every circular shift of their options."""

from __future__ import annotations

import base64
import binascii
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.tasks.base import Sample, SampleError, Scored
from visprune.eval.tasks.choice import ChoiceTask
from visprune.eval.tasks.loading import decode, find_file, require_columns
from visprune.eval.tasks.rows import FileRows, Rows, import_datasets

__all__ = ["MMBench"]

_LETTERS = "ABCD"
_SHIFT = 1_000_000  # the k-th circular shift of question i has the index i + k * this


@dataclass(frozen=True, kw_only=True)
class MMBench(ChoiceTask):
    """MMBench-en dev (arXiv:2307.06281), read by rules alone; circular: all shifts must be right.

    Letters are read as VLMEvalKit reads them without a judge: no language model reads the answers,
    none is guessed for what no rule reads. A folder holds
    ``mmbench_dev_20230712.tsv`` or ``MMBench_DEV_EN.tsv``; ``MMBench_DEV_EN_V11.tsv`` holds
    another selection of questions, version 1.1, which is not this task.

    Args:
        circular: ask every circular shift of the options, which the table must hold; a question is
            right if all are. Otherwise the first order alone is asked.
    """

    name: ClassVar[str] = "mmbench_en"
    VERSION: ClassVar[int] = 2
    HUB: ClassVar[str] = "lmms-lab-encoder/MMBench"
    CONFIG: ClassVar[str | None] = "en"
    SPLITS: ClassVar[Mapping[str, str]] = {"dev": "dev"}
    COLUMNS: ClassVar[Sequence[str]] = ("index", "question", "hint", "answer", "A", "B")
    LAYOUT: ClassVar[str] = "mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv (not V11)"

    split: str = "dev"
    parser: str = "vlmevalkit"
    circular: bool = True

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """Which of the two ways to count."""
        return "letter_match_circular" if self.circular else "letter_match"

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return ``score`` (circular if that is asked), ``vanilla`` and ``per_question``.

        ``vanilla`` is the accuracy on the first orders, ``per_question`` that on all of them. A
        question whose record of one shift holds an error is left out of the circular score, or
        wrong.
        """
        plain = super().aggregate(records, errors_count_as_wrong=errors_count_as_wrong)
        if not self.circular or not plain:
            return plain
        groups: dict[str, list[Scored]] = {}
        for record in records:
            groups.setdefault(record.cluster, []).append(record)
        whole = [
            [record.score or 0.0 for record in group]
            for group in groups.values()
            if errors_count_as_wrong or all(record.score is not None for record in group)
        ]
        # A bootstrap renames what it draws twice: "241#1".
        first = [r for r in records if int(r.sample.partition("#")[0]) < _SHIFT]
        vanilla = super().aggregate(first, errors_count_as_wrong=errors_count_as_wrong)
        found = {"per_question": plain["score"]}
        if whole:
            found["score"] = 100.0 * sum(min(scores) == 1.0 for scores in whole) / len(whole)
        if vanilla:
            found["vanilla"] = vanilla["score"]
        return found

    def _names(self, rows: Rows) -> list[str]:
        return [str(index) for index in _indices(rows)]

    def _groups(self, rows: Rows, names: Sequence[str]) -> Sequence[str]:
        return [str(index % _SHIFT) for index in _indices(rows)]

    def _wanted(self, rows: Rows) -> list[int]:
        indices = _indices(rows)
        if self.circular and max(indices) < _SHIFT:
            raise ConfigError(
                f"mmbench_en: {self._where} holds no circular shift of any question (an index from "
                f"{_SHIFT} on), so there is no circular score; set circular=False."
            )
        return [i for i, index in enumerate(indices) if self.circular or index < _SHIFT]

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, "mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv")
        if told is None:
            return None
        rows = _table(told, (*self.COLUMNS, "image"))
        places = [f"{told}, row {number}" for number in range(len(rows))]
        encoded = {row["index"]: row.pop("image") for row in rows}
        # VLMEvalKit's files name another row where its picture would repeat.
        texts = [encoded.get(encoded[row["index"]], encoded[row["index"]]) for row in rows]
        files = [
            functools.partial(_from_base64, text, f"{told}, index {row['index']}")
            for text, row in zip(texts, rows, strict=True)
        ]
        return FileRows(rows, files, places)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        options: list[str] = []
        for letter in _LETTERS:  # as LLaVA's get_options: the first empty one ends them
            if _is_none(row.get(letter)):
                break
            options.append(str(row[letter]))
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=(row["answer"],),
            choices=tuple(options),
            kind=str(row.get("category") or ""),
            cluster=str(int(row["index"]) % _SHIFT),
            meta={} if _is_none(row["hint"]) else {"hint": str(row["hint"])},
        )


def _table(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a table as texts.

    Raises:
        ConfigError: it is no table, or a column or a cell is missing.
    """
    import_datasets()
    import pandas  # comes with datasets

    try:
        table = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # those of pandas are ValueErrors
        raise ConfigError(f"Cannot read {path}: {error}.") from error
    require_columns(dict.fromkeys(table.columns, ""), needed, str(path))
    rows = table.to_dict("records")
    for number, row in enumerate(rows):
        for name in ("question", "answer", "image"):
            if not row[name]:
                raise ConfigError(
                    f"{path}, row {number}: {name} is empty; the row is cut short or has tabs too "
                    f"few, take the published file."
                )
    return rows


def _indices(rows: Rows) -> list[int]:
    """Return the index of each row.

    Raises:
        ConfigError: one is no number; names the row.
    """
    found = []
    for number, index in enumerate(rows.column("index")):
        try:
            found.append(int(index))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{rows.place(number)}: index is a whole number, got {index!r:.80}."
            ) from error
    return found


def _is_none(value: Any) -> bool:
    """Return whether a cell is empty; tables write that as "nan" or "none" too."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def _from_base64(text: str, where: str, orient: bool = True) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise SampleError(f"{where}: the picture is not base64 ({error}).") from error
    return decode(io.BytesIO(data), where, orient)
