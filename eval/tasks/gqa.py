# SPDX-License-Identifier: Apache-2.0
"""GQA: compositional questions with one short answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from visprune.errors import ConfigError
from visprune.eval.metrics.text import GQA_PARSERS, gqa_match
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, check_option
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, read_object, require_columns
from visprune.eval.tasks.rows import FileRows, HubRows, ImageLoader, Rows
from visprune.eval.tasks.scoring import whole_output

__all__ = ["GQA"]


@dataclass(frozen=True)
class _TwoTables:
    """Questions in one table, pictures in another, joined by ``imageId``."""

    questions: HubRows
    pictures: HubRows
    numbers: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.questions)

    def column(self, name: str) -> list[Any]:
        """Return one text column of the questions."""
        return self.questions.column(name)

    def row(self, number: int) -> Mapping[str, Any]:
        """Return a question."""
        return self.questions.row(number)

    def picture(self, number: int) -> ImageLoader:
        """Return what loads the picture of a question."""
        name = self.questions.row(number)["imageId"]
        if name not in self.numbers:
            raise ConfigError(f"gqa: {self.pictures.name} holds no picture {name!r}.")
        return self.pictures.picture(self.numbers[name])

    def place(self, number: int) -> str:
        """Return where a question stands, for messages."""
        return self.questions.place(number)

    def require(self, needed: Sequence[str]) -> None:
        """Raise ``ConfigError`` unless the questions have these columns."""
        self.questions.require(needed, pictures=False)


@dataclass(frozen=True, kw_only=True)
class GQA(DataTask):
    """GQA test-dev balanced (arXiv:1902.09506): 12,578 questions from scene graphs, exact match.

    A folder holds ``testdev_balanced_questions.json`` (or ``data/`` with it, as in LLaVA's layout)
    and ``images/*.jpg``.

    Args:
        parser: of :class:`visprune.eval.metrics.GQAAccuracy`.
    """

    name: ClassVar[str] = "gqa"
    VERSION: ClassVar[int] = 1
    HUB: ClassVar[str] = "lmms-lab-encoder/GQA"
    CONFIG: ClassVar[str | None] = "testdev_balanced_instructions"
    SPLITS: ClassVar[Mapping[str, str]] = {"testdev_balanced": "testdev"}
    COLUMNS: ClassVar[Sequence[str]] = ("id", "imageId", "question", "answer")
    TEXTS: ClassVar[Sequence[str]] = ("question", "answer")
    LAYOUT: ClassVar[str] = "testdev_balanced_questions.json and images/*.jpg"

    split: str = "testdev_balanced"
    parser: str = "llava"

    def __post_init__(self) -> None:
        """Reject an unknown parser."""
        super().__post_init__()
        check_option(self.name, "parser", self.parser, GQA_PARSERS)

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"gqa_"`` and the parser."""
        return f"gqa_{self.parser}"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question and LLaVA-1.5's instruction."""
        return prompts.short_answer(sample.question, style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Take the whole output (``"whole"``)."""
        return whole_output(text, sample)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 for equality as the parser has it."""
        return gqa_match(parsed.answer or "", sample.answers, self.parser)  # type: ignore[arg-type]

    def _names(self, rows: Rows) -> list[str]:
        return [str(value) for value in rows.column("id")]

    def _rows(self) -> Rows:
        rows = super()._rows()
        if not isinstance(rows, HubRows):
            return rows
        # The Hub keeps the pictures, 398 for 12,578 questions, in a configuration of their own.
        told = self._from_hub(self._where, "testdev_balanced_images")
        pictures = HubRows(told, f"{self._where} (testdev_balanced_images)")
        pictures.require(("id",))
        numbers = {name: number for number, name in enumerate(pictures.column("id"))}
        return _TwoTables(rows, pictures, numbers)

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, *(f"{d}testdev_balanced_questions.json" for d in ("", "data/")))
        if told is None:
            return None
        rows = []
        for name, row in read_object(told).items():
            where = f"{told}, question {name}"
            require_columns(row, ("imageId", "question", "answer"), where)
            picture = told.parent / "images" / f"{row['imageId']}.jpg"
            rows.append((where, {"id": name, **row}, picture))
        return FileRows.of(rows)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        types: Any = row.get("types")
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=(row["answer"],),
            kind=str(types.get("structural", "")) if isinstance(types, Mapping) else "",
            cluster=str(row["imageId"]),
        )
