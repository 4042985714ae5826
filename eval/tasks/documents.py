# SPDX-License-Identifier: Apache-2.0
"""Reading documents: DocVQA and InfographicVQA, scored by ANLS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from visprune.eval.metrics.reading import READING_VARIANTS, anls
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import READING, Parsed, PromptStyle, Sample, Scored, check_option
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, read_rows
from visprune.eval.tasks.rows import FileRows, Rows
from visprune.eval.tasks.scoring import whole_output
from visprune.eval.tasks.vqa import answers_of

__all__ = ["DocVQA", "InfoVQA"]


@dataclass(frozen=True, kw_only=True)
class _DocumentTask(DataTask):
    """Base of the two.

    Args:
        variant: of :func:`visprune.eval.metrics.reading.anls`.
    """

    max_new_tokens: ClassVar[int] = 32
    GROUP: ClassVar[str] = READING
    HUB: ClassVar[str] = "lmms-lab-encoder/DocVQA"
    SPLITS: ClassVar[Mapping[str, str]] = {"val": "validation", "test": "test"}
    UNSCORED: ClassVar[Sequence[str]] = ("test",)
    TEXTS: ClassVar[Sequence[str]] = ("question",)
    COLUMNS: ClassVar[Sequence[str]] = ("questionId", "question", "answers")

    split: str = "val"
    variant: str = "lmms-eval"

    def __post_init__(self) -> None:
        """Reject an unknown variant."""
        super().__post_init__()
        check_option(self.name, "variant", self.variant, READING_VARIANTS)

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"anls_"`` and the variant."""
        return f"anls_{self.variant}"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question and LLaVA-1.5's instruction, as lmms-eval asks."""
        return prompts.short_answer(sample.question, style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Take the whole output (``"whole"``); blanks at its ends count in VLMEvalKit alone."""
        found = whole_output(text, sample)
        if self.variant == "vlmevalkit" and found.answer is not None:
            return Parsed(text, found.rule)
        return found

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return the similarity; 0 where there is nothing to compare with."""
        return anls(parsed.answer or "", sample.answers, self.variant)  # type: ignore[arg-type]

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return ``score`` in percent, overall and by kind; nothing for splits without answers."""
        if not self.scored:
            return {}
        return super().aggregate(records, errors_count_as_wrong=errors_count_as_wrong)

    def _names(self, rows: Rows) -> list[str]:
        return [str(value) for value in rows.column("questionId")]

    def _found(
        self, folder: Path, names: Sequence[str], image: str, places: Sequence[str]
    ) -> FileRows | None:
        """Read a question file of the challenge.

        Args:
            folder: where the data lies.
            names: the file's names, the first that is there counts.
            image: column of the picture's name.
            places: folders of the pictures.
        """
        told = find_file(folder, *names)
        if told is None:
            return None
        needed = ("questionId", "question", image, *(("answers",) if self.scored else ()))
        place = next((p for p in places if (folder / p).is_dir()), places[0])
        rows = []
        for where, row in read_rows(told, needed, "data"):
            row["answers"] = answers_of(row.get("answers"), where, needed=self.scored)
            rows.append((where, row, folder / place / Path(str(row[image])).name))
        return FileRows.of(rows)

    def _made(self, number: int, name: str, rows: Rows, kinds: Any, cluster: Any) -> Sample:
        row = rows.row(number)
        listed = kinds if isinstance(kinds, list) else [kinds] if kinds else []
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=answers_of(row["answers"], rows.place(number), needed=self.scored),
            kind=", ".join(map(str, listed)),
            cluster=str(cluster or name),
        )


@dataclass(frozen=True, kw_only=True)
class DocVQA(_DocumentTask):
    """DocVQA validation (arXiv:2007.00398): 5,349 questions about scanned pages, ANLS.

    The answers of its test split are kept by a server. A folder holds ``val_v1.0_withQT.json`` (or
    ``val_v1.0.json``, ``test_v1.0.json``) and the pages in ``documents/`` or
    ``spdocvqa_images/``.

    Args:
        split: ``"val"`` or ``"test"``.
    """

    name: ClassVar[str] = "docvqa"
    VERSION: ClassVar[int] = 1
    CONFIG: ClassVar[str | None] = "DocVQA"
    LAYOUT: ClassVar[str] = "val_v1.0_withQT.json and documents/"

    def _files(self, folder: Path) -> FileRows | None:
        names = [f"{self.split}_v1.0_withQT.json", f"{self.split}_v1.0.json"]
        return self._found(folder, names, "image", ("documents", "spdocvqa_images"))

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        document = row.get("ucsf_document_id")
        page = f"{document}_{row.get('ucsf_document_page_no')}" if document else row.get("docId")
        return self._made(number, name, rows, row.get("question_types"), page)


@dataclass(frozen=True, kw_only=True)
class InfoVQA(_DocumentTask):
    """InfographicVQA validation (arXiv:2104.12756): 2,801 questions about infographics, ANLS.

    The answers of its test split are kept by a server. A folder holds
    ``infographicsVQA_val_v1.0_withQT.json`` (or ``infographicsVQA_test_v1.0.json``) and the
    pictures in ``infographicsvqa_images/`` or ``images/``.

    Args:
        split: ``"val"`` or ``"test"``.
    """

    name: ClassVar[str] = "infovqa"
    VERSION: ClassVar[int] = 1
    CONFIG: ClassVar[str | None] = "InfographicVQA"
    LAYOUT: ClassVar[str] = "infographicsVQA_val_v1.0_withQT.json and infographicsvqa_images/"

    def _files(self, folder: Path) -> FileRows | None:
        names = [f"infographicsVQA_{self.split}_v1.0{end}.json" for end in ("_withQT", "")]
        places = ("infographicsvqa_images", "images")
        return self._found(folder, names, "image_local_name", places)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return self._made(number, name, rows, row.get("answer_type"), row.get("image_url"))
