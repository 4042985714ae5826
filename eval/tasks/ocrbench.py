# SPDX-License-Identifier: Apache-2.0
"""OCRBench: read what stands in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from visprune.eval.metrics.reading import READING_VARIANTS, contains_answer
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import READING, Parsed, PromptStyle, Sample, Scored, check_option
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, read_rows
from visprune.eval.tasks.rows import FileRows, Rows
from visprune.eval.tasks.scoring import whole_output
from visprune.eval.tasks.vqa import answers_of

__all__ = ["EXPRESSIONS", "OCRBench"]

EXPRESSIONS = "Handwritten Mathematical Expression Recognition"
_RECOGNITION = (
    "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
    "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OCRBench(DataTask):
    """OCRBench (arXiv:2305.07895): 1,000 questions of ten kinds, right if the answer is said.

    Papers give ``final``, the number of right answers of 1,000; ``score`` is their share.
    A folder holds ``OCRBench.json`` (or ``OCRBench/OCRBench.json``) and ``OCRBench_Images/``.

    Args:
        variant: of :func:`visprune.eval.metrics.reading.contains_answer`.
    """

    name: ClassVar[str] = "ocrbench"
    VERSION: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 128
    GROUP: ClassVar[str] = READING
    HUB: ClassVar[str] = "echo840/OCRBench"
    SPLITS: ClassVar[Mapping[str, str]] = {"test": "test"}
    COLUMNS: ClassVar[Sequence[str]] = ("dataset", "question", "question_type", "answer")
    TEXTS: ClassVar[Sequence[str]] = ("question", "question_type")
    LAYOUT: ClassVar[str] = "OCRBench.json and OCRBench_Images/"

    split: str = "test"
    variant: str = "lmms-eval"

    def __post_init__(self) -> None:
        """Reject an unknown variant."""
        super().__post_init__()
        check_option(self.name, "variant", self.variant, READING_VARIANTS)

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"ocrbench_"`` and the variant."""
        return f"ocrbench_{self.variant}"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question alone, in every style: it says what is wanted."""
        return prompts.instructed([sample.question.strip()], "", style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Take the whole output (``"whole"``)."""
        return whole_output(text, sample)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 if one of the answers is in the output."""
        return contains_answer(
            parsed.answer or "", sample.answers, expression=sample.kind == EXPRESSIONS,
            variant=self.variant,  # type: ignore[arg-type]
        )  # fmt: skip

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return ``score``, that of each kind and of ``Text Recognition``, and ``final``."""
        found = super().aggregate(records, errors_count_as_wrong=errors_count_as_wrong)
        if not found:
            return found
        kinds = [record for record in records if record.kind in _RECOGNITION]
        together = super().aggregate(kinds, errors_count_as_wrong=errors_count_as_wrong)
        if together and len(found) > 1:
            found["score/Text Recognition"] = together["score"]
        found["final"] = sum(record.score or 0.0 for record in records)
        return found

    def _names(self, rows: Rows) -> list[str]:
        return [str(number) for number in range(len(rows))]  # the Hub's have no id

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, "OCRBench.json", "OCRBench/OCRBench.json")
        if told is None:
            return None
        rows = []
        for where, row in read_rows(
            told, ("dataset_name", "image_path", "question", "answers", "type")
        ):
            columns = {
                "dataset": row["dataset_name"], "question": row["question"],
                "question_type": row["type"], "answer": _listed(row["answers"]),
                "image_path": row["image_path"],
            }  # fmt: skip
            rows.append((where, columns, folder / "OCRBench_Images" / str(row["image_path"])))
        return FileRows.of(rows)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=answers_of(_listed(row["answer"]), rows.place(number)),
            kind=row["question_type"],
            cluster=name,  # no picture is asked about twice
            meta={"dataset": str(row["dataset"])},
        )


def _listed(answers: object) -> object:
    """Return one text as a list of it: the published file has both."""
    return [answers] if isinstance(answers, str) else answers
