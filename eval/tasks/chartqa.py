# SPDX-License-Identifier: Apache-2.0
"""ChartQA: questions about charts, right within 5 %."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from visprune.errors import ConfigError
from visprune.eval.metrics.reading import READING_VARIANTS, relaxed_match
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import READING, Parsed, PromptStyle, Sample, SampleError, check_option
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, read_rows
from visprune.eval.tasks.rows import FileRows, HubRows, Rows
from visprune.eval.tasks.scoring import whole_output

__all__ = ["ChartQA"]

_PARTS = ("human", "augmented")


@dataclass(frozen=True, kw_only=True)
class ChartQA(DataTask):
    """ChartQA test (arXiv:2203.10244): 1,250 questions by people, 1,250 generated; within 5 %.

    A folder holds ``test_human.json``, ``test_augmented.json`` and ``png/``, as the published
    ``ChartQA Dataset/test`` does, or ``test/`` with them. The score is that of all 2,500;
    ``score/human_test`` and ``score/augmented_test`` are the parts, whose mean papers give.

    Args:
        variant: of :func:`visprune.eval.metrics.reading.relaxed_match`.
    """

    name: ClassVar[str] = "chartqa"
    VERSION: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 16
    GROUP: ClassVar[str] = READING
    HUB: ClassVar[str] = "lmms-lab-encoder/ChartQA"
    SPLITS: ClassVar[Mapping[str, str]] = {"test": "test"}
    COLUMNS: ClassVar[Sequence[str]] = ("type", "question", "answer")
    TEXTS: ClassVar[Sequence[str]] = ("type", "question", "answer")
    LAYOUT: ClassVar[str] = "test_human.json, test_augmented.json and png/"

    split: str = "test"
    variant: str = "lmms-eval"

    def __post_init__(self) -> None:
        """Reject an unknown variant."""
        super().__post_init__()
        check_option(self.name, "variant", self.variant, READING_VARIANTS)

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"relaxed_accuracy_"`` and the variant."""
        return f"relaxed_accuracy_{self.variant}"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question and LLaVA-1.5's instruction."""
        return prompts.short_answer(sample.question, style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Take the whole output (``"whole"``)."""
        return whole_output(text, sample)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 within 5 %, or for the same text."""
        (answer,) = sample.answers
        return relaxed_match(parsed.answer or "", answer, self.variant)  # type: ignore[arg-type]

    def _names(self, rows: Rows) -> list[str]:
        seen = dict.fromkeys(rows.column("type"), -1)
        names = []
        for kind in rows.column("type"):  # the published files have no ids: numbers within a part
            seen[kind] += 1
            names.append(f"{kind}/{seen[kind]}")
        return names

    def _files(self, folder: Path) -> FileRows | None:
        found = {
            part: find_file(folder, f"test_{part}.json", f"test/test_{part}.json")
            for part in _PARTS
        }
        if not any(found.values()):
            return None
        rows = []
        for part, told in found.items():
            if told is None:
                raise ConfigError(
                    f"chartqa: {folder} has one of test_human.json and test_augmented.json without "
                    f"the other; the benchmark is both."
                )
            for where, row in read_rows(told, ("imgname", "query", "label")):
                answer = row["label"]
                columns = {
                    "type": f"{part}_test", "question": row["query"],
                    "answer": answer if isinstance(answer, str) else str(answer),
                    "imgname": row["imgname"],
                }  # fmt: skip
                rows.append((where, columns, told.parent / "png" / str(row["imgname"])))
        return FileRows.of(rows)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=(row["answer"],),
            kind=row["type"],
            cluster=_chart(number, name, rows),
        )


def _chart(number: int, name: str, rows: Rows) -> str:
    """Return the id of a row's chart, about which others may ask too; the Hub's rows have none."""
    if not isinstance(rows, HubRows):
        return str(rows.row(number)["imgname"])
    try:
        return rows.picture_id(number)
    except (SampleError, OSError):
        return name  # whoever asks for the picture gets the error
