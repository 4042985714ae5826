# SPDX-License-Identifier: Apache-2.0
"""Short-answer VQA with ten human answers: what its tasks share, VQAv2 and VizWiz.

The answers of the splits that papers report for VQAv2 (test-dev) and VizWiz (test) are kept by
servers: those splits have no score here, and :func:`visprune.eval.llava_files.write_submission`
writes what is handed in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from visprune.errors import ConfigError
from visprune.eval.metrics.vqa import vqa_accuracy
from visprune.eval.metrics.vqa_text import NORMALISERS
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, Scored, check_option
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, jsonl_lines, read_rows
from visprune.eval.tasks.rows import FileRows, Rows
from visprune.eval.tasks.scoring import whole_output

__all__ = ["VQATask", "VQAv2", "VizWiz", "answers_of"]


@dataclass(frozen=True, kw_only=True)
class VQATask(DataTask):
    """Base of the tasks with ten human answers.

    Args:
        variant: of :func:`visprune.eval.metrics.vqa_accuracy`.
    """

    TEXTS: ClassVar[Sequence[str]] = ("question",)

    variant: str = "official"

    def __post_init__(self) -> None:
        """Reject an unknown variant."""
        super().__post_init__()
        check_option(self.name, "variant", self.variant, tuple(NORMALISERS))

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"vqa_"`` and the variant."""
        return f"vqa_{self.variant}"

    def _asked(self, number: int, name: str, rows: Rows, row: Mapping[str, Any]) -> Sample:
        """What the samples of all these tasks have; each adds its kind, cluster or meta."""
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=answers_of(row["answers"], rows.place(number), needed=self.scored),
            cluster=str(row.get("image_id", name)),
        )

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question and LLaVA-1.5's instruction."""
        return prompts.short_answer(sample.question, style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Take the whole output (``"whole"``); the metric normalises."""
        return whole_output(text, sample)

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return ``score`` in percent, overall and by kind; nothing for splits without answers."""
        if not self.scored:
            return {}
        return super().aggregate(records, errors_count_as_wrong=errors_count_as_wrong)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return the soft accuracy; 0 where there is nothing to compare with."""
        if not sample.answers:
            return 0.0
        return vqa_accuracy(parsed.answer or "", sample.answers, self.variant)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class VQAv2(VQATask):
    """VQAv2 validation (arXiv:1612.00837): 214,354 questions on COCO, VQA soft accuracy.

    A folder holds ``v2_OpenEnded_mscoco_val2014_questions.json``,
    ``v2_mscoco_val2014_annotations.json`` and ``val2014/COCO_val2014_*.jpg``; for ``test-dev``,
    which has no public answers, LLaVA's ``llava_vqav2_mscoco_test-dev2015.jsonl`` and
    ``test2015/``.

    Args:
        split: ``"val"`` or ``"test-dev"``.
    """

    name: ClassVar[str] = "vqav2"
    VERSION: ClassVar[int] = 1
    HUB: ClassVar[str] = "lmms-lab-encoder/VQAv2"
    SPLITS: ClassVar[Mapping[str, str]] = {"val": "validation", "test-dev": "testdev"}
    UNSCORED: ClassVar[Sequence[str]] = ("test-dev",)
    COLUMNS: ClassVar[Sequence[str]] = ("question_id", "question", "answers", "image_id")
    LAYOUT: ClassVar[str] = "v2_OpenEnded_mscoco_val2014_questions.json and the annotations"

    split: str = "val"

    def _files(self, folder: Path) -> FileRows | None:
        if not self.scored:
            return _test_dev(folder)
        asked = find_file(folder, "v2_OpenEnded_mscoco_val2014_questions.json")
        if asked is None:
            return None
        told = find_file(folder, "v2_mscoco_val2014_annotations.json")
        if told is None:
            raise ConfigError(
                f"{self.name}: {folder} has the questions without their answers, "
                f"v2_mscoco_val2014_annotations.json."
            )
        annotated = read_rows(told, ("question_id", "answers"), "annotations")
        answers = {str(row["question_id"]): row for _, row in annotated}
        rows = []
        asks = ("question_id", "question", "image_id")
        for where, row in read_rows(asked, asks, "questions"):
            found = answers.get(str(row["question_id"]))
            if found is None:
                raise ConfigError(
                    f"{where} is question {row['question_id']}, which {told} does not answer; take "
                    f"both files from one download."
                )
            image = _number(row["image_id"], where)
            row = {**row, **found, "answers": answers_of(found["answers"], where)}
            rows.append((where, row, folder / f"val2014/COCO_val2014_{image:012d}.jpg"))
        return FileRows.of(rows)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return dataclasses.replace(
            self._asked(number, name, rows, row),
            kind=str(row.get("answer_type", "")),
            meta={"question_type": row.get("question_type", "")},
        )


def _test_dev(folder: Path) -> FileRows | None:
    """Read LLaVA's question file of VQAv2's test-dev."""
    asked = find_file(folder, "llava_vqav2_mscoco_test-dev2015.jsonl")
    if asked is None:
        return None
    rows = []
    for where, row in jsonl_lines(asked, ("question_id", "image", "text")):
        question = str(row["text"]).removesuffix(f"\n{prompts.SHORT_ANSWER}")
        picture = str(row["image"])
        image = _number(Path(picture).stem.rpartition("_")[2], where)
        row = {**row, "question": question, "answers": (), "image_id": image}
        rows.append((where, row, folder / "test2015" / picture))
    return FileRows.of(rows)


def _number(value: Any, where: str) -> int:
    """Return the number of a COCO picture."""
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: COCO numbers its pictures, got image_id={value!r:.80}."
        ) from error


@dataclass(frozen=True, kw_only=True)
class VizWiz(VQATask):
    """VizWiz-VQA validation (arXiv:1802.08218): 4,319 questions by blind people.

    LLaVA-1.5's paper gives the test split, which the server scores; tables of pruning papers mix
    the two. A folder holds ``val.json`` and ``val/*.jpg``, or ``test.json`` and ``test/*.jpg``.

    Args:
        split: ``"val"`` or ``"test"``.
    """

    name: ClassVar[str] = "vizwiz"
    VERSION: ClassVar[int] = 1
    HUB: ClassVar[str] = "lmms-lab-encoder/VizWiz-VQA"
    SPLITS: ClassVar[Mapping[str, str]] = {"val": "val", "test": "test"}
    UNSCORED: ClassVar[Sequence[str]] = ("test",)
    COLUMNS: ClassVar[Sequence[str]] = ("question_id", "question", "answers")
    LAYOUT: ClassVar[str] = "val.json and val/*.jpg"

    split: str = "val"
    variant: str = "evalai"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question and LLaVA-1.5's instruction, which allows "Unanswerable"."""
        question = sample.question.capitalize() if style == "chat" else sample.question
        return prompts.short_answer(question, style, prompts.UNANSWERABLE)

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, f"{self.split}.json", f"Annotations/{self.split}.json")
        if told is None:
            return None
        needed = ("image", "question", *(("answers",) if self.scored else ()))
        rows = []
        for where, row in read_rows(told, needed):
            picture = str(row["image"])
            row["answers"] = answers_of(row.get("answers"), where, needed=self.scored)
            row["question_id"] = Path(picture).stem
            row["category"] = row.get("answer_type", "")
            rows.append((where, row, folder / self.split / picture))
        return FileRows.of(rows)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        kind = str(row.get("category") or "")
        return dataclasses.replace(self._asked(number, name, rows, row), kind=kind, cluster=name)


def answers_of(value: Any, where: str, *, needed: bool = True) -> tuple[str, ...]:
    """Return the texts of ``answers``: texts, ``{"answer": text}``, or a dictionary of lists.

    Raises:
        ConfigError: another form, or no answer where one is needed.
    """
    listed = value.get("answer") if isinstance(value, Mapping) else value
    if listed is None and not needed:
        return ()
    if isinstance(listed, list | tuple) and (listed or not needed):
        found = [item.get("answer") if isinstance(item, Mapping) else item for item in listed]
        texts = tuple(text for text in found if isinstance(text, str))
        if len(texts) == len(found):
            return texts
    raise ConfigError(
        f"{where}: answers is a list of what people said, texts or {{'answer': text}}; got "
        f"{value!r:.80}."
    )
