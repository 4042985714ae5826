# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: what its tasks share, ScienceQA-IMG and SEED-Bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from visprune.errors import ConfigError
from visprune.eval.metrics.letters import LETTER_PARSERS, parse_letter
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, check_option
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, read_object, read_rows, require_columns
from visprune.eval.tasks.rows import FileRows, Rows
from visprune.eval.tasks.scoring import score_letter

__all__ = ["ChoiceTask", "SEEDBench", "ScienceQA"]

_LETTERS = "ABCDE"


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(DataTask):
    """Base of the tasks with lettered options.

    Args:
        parser: of :class:`visprune.eval.metrics.LetterMatch`.
    """

    metric_name: ClassVar[str] = "letter_match"
    TEXTS: ClassVar[Sequence[str]] = ("question", "answer")

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
class ScienceQA(ChoiceTask):
    """ScienceQA-IMG test (arXiv:2209.09513): the 2,017 questions that have a picture.

    A folder holds ``problems.json``, ``pid_splits.json`` and ``images/test/PID/image.png`` (or
    ``test/PID/image.png``).
    """

    name: ClassVar[str] = "scienceqa_img"
    VERSION: ClassVar[int] = 2
    HUB: ClassVar[str] = "lmms-lab-encoder/ScienceQA"
    CONFIG: ClassVar[str | None] = "ScienceQA-IMG"
    SPLITS: ClassVar[Mapping[str, str]] = {"test": "test", "val": "validation"}
    COLUMNS: ClassVar[Sequence[str]] = ("question", "choices", "answer", "hint")
    TEXTS: ClassVar[Sequence[str]] = ("question",)
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
        problems, rows = read_object(told), []
        for name in self._pids(split):
            if name not in problems:
                raise ConfigError(
                    f"{split} names the problem {name!r}, which {told} does not hold; take both "
                    f"files from one download."
                )
            problem, where = problems[name], f"{told}, problem {name}"
            require_columns(problem, self.COLUMNS, where, nullable=("hint",))
            if not problem.get("image"):
                continue
            inside = f"{self.split}/{name}/{problem['image']}"
            file = find_file(folder, f"images/{inside}", inside) or folder / "images" / inside
            rows.append((where, {"pid": name, **problem, "hint": problem["hint"] or ""}, file))
        return FileRows.of(rows)

    def _pids(self, path: Path) -> list[str]:
        """Return the ids of the split's problems."""
        splits = read_object(path)
        found = splits.get(self.split)
        if not isinstance(found, list):
            raise ConfigError(
                f"{path} has no list of the problems of {self.split!r}; it has: "
                f"{', '.join(splits) or 'nothing'}."
            )
        return [str(name) for name in found]

    def _check(self, rows: Rows, wanted: Sequence[int]) -> None:
        super()._check(rows, wanted)
        pairs = zip(rows.column("choices"), rows.column("answer"), strict=True)
        for number, (choices, answer) in enumerate(pairs):
            texts = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
            if not texts or not 0 < len(choices) <= len(_LETTERS):
                raise ConfigError(
                    f"{rows.place(number)}: choices is a list of up to {len(_LETTERS)} texts, got "
                    f"{choices!r:.80}."
                )
            if not isinstance(answer, int) or not 0 <= answer < len(choices):
                raise ConfigError(
                    f"{rows.place(number)}: answer is the number of a choice, from 0 to "
                    f"{len(choices) - 1}, got {answer!r:.40}."
                )

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


_SEED_TYPES = {
    "1": "Scene Understanding",
    "2": "Instance Identity",
    "3": "Instance Attributes",
    "4": "Instance Location",
    "5": "Instance Counting",
    "6": "Spatial Relation",
    "7": "Instance Interaction",
    "8": "Visual Reasoning",
    "9": "Text Understanding",
}


@dataclass(frozen=True, kw_only=True)
class SEEDBench(ChoiceTask):
    """SEED-Bench, image part (arXiv:2307.16125): 14,233 questions of nine types, first letter.

    A folder holds ``SEED-Bench.json`` and ``SEED-Bench-image/``.

    Args:
        parser: ``"seed-lmms-eval"`` (the first character) or ``"seed-llava"`` (the whole output,
            as LLaVA's submission is scored); or another of
            :class:`visprune.eval.metrics.LetterMatch`.
    """

    name: ClassVar[str] = "seedbench_image"
    VERSION: ClassVar[int] = 2
    HUB: ClassVar[str] = "lmms-lab-encoder/SEED-Bench"
    SPLITS: ClassVar[Mapping[str, str]] = {"test": "test"}
    COLUMNS: ClassVar[Sequence[str]] = (
        *("question_id", "question", "answer", "data_type"),
        *("choice_a", "choice_b", "choice_c", "choice_d"),
    )
    LAYOUT: ClassVar[str] = "SEED-Bench.json and SEED-Bench-image/"

    split: str = "test"
    parser: str = "seed-lmms-eval"

    def _wanted(self, rows: Rows) -> list[int]:
        return [i for i, kind in enumerate(rows.column("data_type")) if kind == "image"]

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, "SEED-Bench.json")
        if told is None:
            return None
        pictures = folder / "SEED-Bench-image"
        return FileRows.of(
            (where, row, pictures / str(row["data_id"]))
            for where, row in read_rows(told, (*self.COLUMNS, "data_id"), "questions")
            if row["data_type"] == "image"
        )

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=(row["answer"],),
            choices=tuple(str(row[f"choice_{letter}"]) for letter in "abcd"),
            kind=_SEED_TYPES.get(str(row.get("question_type_id")), ""),
            cluster=str(row.get("data_id", name)),
        )
