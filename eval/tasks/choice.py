# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: ScienceQA-IMG, MMBench and SEED-Bench."""

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
from visprune.eval import prompts
from visprune.eval.metrics.letters import LETTER_PARSERS, parse_letter
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, SampleError, Scored, check_option
from visprune.eval.tasks.data import DataTask, FileRows, Rows, import_datasets
from visprune.eval.tasks.loading import decode, find_file, read_json, require_columns
from visprune.eval.tasks.scoring import score_letter

__all__ = ["MMBench", "SEEDBench", "ScienceQA"]

_LETTERS = "ABCDE"
_SHIFT = 1_000_000  # MMBench numbers the k-th circular shift of question i as i + k * this


@dataclass(frozen=True, kw_only=True)
class _ChoiceTask(DataTask):
    """Base of the tasks with lettered options.

    Args:
        parser: of :class:`visprune.eval.metrics.LetterMatch`.
    """

    metric_name: ClassVar[str] = "letter_match"

    parser: str = "lenient"

    def __post_init__(self) -> None:
        """Reject an unknown parser."""
        super().__post_init__()
        check_option(self.name, "parser", self.parser, LETTER_PARSERS)

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return hint, question, options and LLaVA-1.5's instruction."""
        hint = str(sample.meta.get("hint", ""))
        return prompts.multiple_choice(sample.question, sample.choices, style, hint)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read a letter by the parser's rules."""
        return Parsed(*parse_letter(text, sample.choices, self.parser))  # type: ignore[arg-type]

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 for the right letter."""
        return score_letter(sample, parsed)


@dataclass(frozen=True, kw_only=True)
class ScienceQA(_ChoiceTask):
    """ScienceQA-IMG test (arXiv:2209.09513): the 2,017 questions that have a picture.

    A folder holds ``problems.json``, ``pid_splits.json`` and ``images/test/PID/image.png`` (or
    ``test/PID/image.png``).
    """

    name: ClassVar[str] = "scienceqa_img"
    VERSION: ClassVar[int] = 1
    HUB: ClassVar[str] = "lmms-lab-encoder/ScienceQA"
    CONFIG: ClassVar[str | None] = "ScienceQA-IMG"
    SPLITS: ClassVar[Mapping[str, str]] = {"test": "test", "val": "validation"}
    COLUMNS: ClassVar[Sequence[str]] = ("question", "choices", "answer", "hint")
    LAYOUT: ClassVar[str] = "problems.json, pid_splits.json and images/test/PID/image.png"

    split: str = "test"
    parser: str = "scienceqa-llava"

    def _names(self, rows: Rows) -> list[str]:
        if "pid" in rows.row(0):
            return [str(name) for name in rows.column("pid")]
        return [f"{self.split}/{number}" for number in range(len(rows))]  # the Hub's have no id

    def _files(self, folder: Path) -> FileRows | None:
        told, split = find_file(folder, "problems.json"), find_file(folder, "pid_splits.json")
        if told is None:
            return None
        if split is None:
            raise ConfigError(f"scienceqa_img: {folder} has problems.json but no pid_splits.json.")
        problems = read_json(told)
        rows, files = [], []
        for name in read_json(split)[self.split]:
            problem = problems[name]
            if not problem.get("image"):
                continue
            rows.append({"pid": name, **problem})
            inside = f"{self.split}/{name}/{problem['image']}"
            files.append(
                find_file(folder, f"images/{inside}", inside) or folder / "images" / inside
            )
        return FileRows(rows, files)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=(_LETTERS[row["answer"]],),
            choices=tuple(row["choices"]),
            kind=str(row.get("subject") or ""),
            cluster=name,
            meta={"hint": f"Context: {row['hint']}"} if row["hint"] else {},
        )


@dataclass(frozen=True, kw_only=True)
class MMBench(_ChoiceTask):
    """MMBench-en dev (arXiv:2307.06281), read by rules alone; circular: all shifts must be right.

    No language model reads the answers, none is guessed for what no rule reads. A folder holds
    ``mmbench_dev_20230712.tsv`` or ``MMBench_DEV_EN.tsv``.

    Args:
        circular: ask every circular shift of the options; a question is right if all are.
            Otherwise the first order alone is asked.
    """

    name: ClassVar[str] = "mmbench_en"
    VERSION: ClassVar[int] = 1
    HUB: ClassVar[str] = "lmms-lab-encoder/MMBench"
    CONFIG: ClassVar[str | None] = "en"
    SPLITS: ClassVar[Mapping[str, str]] = {"dev": "dev"}
    COLUMNS: ClassVar[Sequence[str]] = ("index", "question", "hint", "answer", "A", "B")
    LAYOUT: ClassVar[str] = "mmbench_dev_20230712.tsv"

    split: str = "dev"
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
        return [str(index) for index in rows.column("index")]

    def _groups(self, rows: Rows, names: Sequence[str]) -> Sequence[str]:
        return [str(int(index) % _SHIFT) for index in rows.column("index")]

    def _wanted(self, rows: Rows) -> list[int]:
        indices = rows.column("index")
        return [i for i, index in enumerate(indices) if self.circular or int(index) < _SHIFT]

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, "mmbench_dev_20230712.tsv", "MMBench_DEV_EN*.tsv")
        if told is None:
            return None
        import_datasets()
        import pandas  # comes with datasets

        table = pandas.read_csv(told, sep="\t", dtype=str, keep_default_na=False)
        rows: list[dict[str, Any]] = table.to_dict("records")
        for row in rows:
            require_columns(row, (*self.COLUMNS, "image"), str(told))
        encoded = {row["index"]: row.pop("image") for row in rows}
        # VLMEvalKit's files name another row where its picture would repeat.
        texts = [encoded.get(encoded[row["index"]], encoded[row["index"]]) for row in rows]
        files = [
            functools.partial(_from_base64, text, f"{told}, index {row['index']}")
            for text, row in zip(texts, rows, strict=True)
        ]
        return FileRows(rows, files)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        options: list[str] = []
        for letter in _LETTERS[:4]:  # as LLaVA's get_options: the first empty one ends them
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


def _is_none(value: Any) -> bool:
    """Return whether a cell is empty; tables write that as "nan" or "none" too."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def _from_base64(text: str, where: str) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise SampleError(f"{where}: the picture is not base64 ({error}).") from error
    return decode(io.BytesIO(data), where)


_SEED_TYPES = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attributes",
    4: "Instance Location",
    5: "Instance Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
}


@dataclass(frozen=True, kw_only=True)
class SEEDBench(_ChoiceTask):
    """SEED-Bench, image part (arXiv:2307.16125): 14,233 questions of nine types, first letter.

    A folder holds ``SEED-Bench.json`` and ``SEED-Bench-image/``.
    """

    name: ClassVar[str] = "seedbench_image"
    VERSION: ClassVar[int] = 1
    HUB: ClassVar[str] = "lmms-lab-encoder/SEED-Bench"
    SPLITS: ClassVar[Mapping[str, str]] = {"test": "test"}
    COLUMNS: ClassVar[Sequence[str]] = (
        *("question_id", "question", "answer", "data_type"),
        *("choice_a", "choice_b", "choice_c", "choice_d"),
    )
    LAYOUT: ClassVar[str] = "SEED-Bench.json and SEED-Bench-image/"

    split: str = "test"
    parser: str = "seed"

    def _wanted(self, rows: Rows) -> list[int]:
        return [i for i, kind in enumerate(rows.column("data_type")) if kind == "image"]

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, "SEED-Bench.json")
        if told is None:
            return None
        rows = [row for row in read_json(told)["questions"] if row.get("data_type") == "image"]
        return FileRows(rows, [folder / "SEED-Bench-image" / str(row["data_id"]) for row in rows])

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=(row["answer"],),
            choices=tuple(row[f"choice_{letter}"] for letter in "abcd"),
            kind=_SEED_TYPES.get(int(row.get("question_type_id") or 0), ""),
            cluster=str(row.get("data_id", name)),
        )
