# SPDX-License-Identifier: Apache-2.0
"""Short-answer VQA with ten human answers: VQAv2, TextVQA and VizWiz.

The answers of the splits that papers report for VQAv2 (test-dev) and VizWiz (test) are kept by
servers: those splits have no score here, and :func:`visprune.eval.llava_files.write_submission`
writes what is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from visprune.errors import ConfigError
from visprune.eval import prompts
from visprune.eval.metrics.vqa import vqa_accuracy
from visprune.eval.metrics.vqa_text import NORMALISERS
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, Scored, check_option
from visprune.eval.tasks.data import DataTask, FileRows, Rows
from visprune.eval.tasks.loading import (
    find_file,
    jsonl_lines,
    read_json,
    read_jsonl,
    require_columns,
)
from visprune.eval.tasks.scoring import whole_output

__all__ = ["TextVQA", "VQAv2", "VizWiz"]

_OCR = "Reference OCR token: "


@dataclass(frozen=True, kw_only=True)
class _VQATask(DataTask):
    """Base of the tasks with ten human answers.

    Args:
        variant: of :func:`visprune.eval.metrics.vqa_accuracy`.
    """

    variant: str = "official"

    def __post_init__(self) -> None:
        """Reject an unknown variant."""
        super().__post_init__()
        check_option(self.name, "variant", self.variant, tuple(NORMALISERS))

    @property
    def metric_name(self) -> str:  # type: ignore[override]
        """``"vqa_"`` and the variant."""
        return f"vqa_{self.variant}"

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
class VQAv2(_VQATask):
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
        answers = {row["question_id"]: row for row in read_json(told)["annotations"]}
        questions = read_json(asked)["questions"]
        rows = [row | answers.get(row["question_id"], {}) for row in questions]
        for row in rows:
            require_columns(row, self.COLUMNS, f"question {row.get('question_id')} of {told.name}")
            row["answers"] = [answer["answer"] for answer in row["answers"]]
        files = [folder / f"val2014/COCO_val2014_{int(r['image_id']):012d}.jpg" for r in rows]
        return FileRows(rows, files)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=_answers(row["answers"]),
            kind=str(row.get("answer_type", "")),
            cluster=str(row["image_id"]),
            meta={"question_type": row.get("question_type", "")},
        )


def _test_dev(folder: Path) -> FileRows | None:
    """Read LLaVA's question file of VQAv2's test-dev."""
    asked = find_file(folder, "llava_vqav2_mscoco_test-dev2015.jsonl")
    if asked is None:
        return None
    rows, files = [], []
    for where, row in jsonl_lines(asked):
        require_columns(row, ("question_id", "image", "text"), where)
        question = row["text"].removesuffix(f"\n{prompts.SHORT_ANSWER}")
        image = int(Path(row["image"]).stem.rpartition("_")[2])
        rows.append({**row, "question": question, "answers": None, "image_id": image})
        files.append(folder / "test2015" / row["image"])
    return FileRows(rows, files)


@dataclass(frozen=True, kw_only=True)
class TextVQA(_VQATask):
    """TextVQA validation (arXiv:1904.08920): 5,000 questions about text in pictures.

    A folder holds ``TextVQA_0.5.1_val.json``, ``train_images/*.jpg`` and, for ``ocr=True``,
    LLaVA's ``llava_textvqa_val_v051_ocr.jsonl`` or ``TextVQA_Rosetta_OCR_v0.2_val.json``.

    Args:
        ocr: put the OCR system's words into the prompt, as LLaVA-1.5 did (58.2 with, 45 to 49
            without); the option stands in every row of the results.
    """

    name: ClassVar[str] = "textvqa"
    VERSION: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 16
    HUB: ClassVar[str] = "lmms-lab-encoder/textvqa"
    SPLITS: ClassVar[Mapping[str, str]] = {"val": "validation"}
    COLUMNS: ClassVar[Sequence[str]] = ("question_id", "question", "answers", "image_id")
    LAYOUT: ClassVar[str] = "TextVQA_0.5.1_val.json"

    split: str = "val"
    variant: str = "evalai"
    ocr: bool = False

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question, the OCR tokens if asked for, and LLaVA-1.5's instruction.

        In the style ``"chat"`` the question begins with a capital, as in lmms-eval.
        """
        lines = [sample.question.capitalize() if style == "chat" else sample.question]
        if self.ocr:
            lines.append(_OCR + ", ".join(sample.meta["ocr_tokens"]))
        return prompts.instructed(lines, prompts.SHORT_ANSWER, style)

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, "TextVQA_0.5.1_val.json")
        if told is None:
            return None
        rows = read_json(told)["data"]
        if self.ocr:
            tokens = _ocr_tokens(folder)
            for row in rows:
                key = (row["image_id"], row["question"].lower())
                row["ocr_tokens"] = tokens.get(key, tokens.get((row["image_id"], ""), []))
        return FileRows(rows, [folder / f"train_images/{row['image_id']}.jpg" for row in rows])

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        if self.ocr and "ocr_tokens" not in row:
            raise ConfigError(f"textvqa with ocr=True: {self._where} has no column ocr_tokens.")
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=_answers(row["answers"]),
            cluster=str(row["image_id"]),
            meta={"ocr_tokens": list(row["ocr_tokens"])} if self.ocr else {},
        )


def _ocr_tokens(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Return OCR tokens by picture and question (LLaVA's file) or by picture (Rosetta's)."""
    llava = find_file(folder, "llava_textvqa_val_v051_ocr.jsonl")
    if llava is not None:
        found = {}
        for row in read_jsonl(llava):
            question, _, rest = row["text"].partition(f"\n{_OCR}")
            tokens = rest.partition("\n")[0].split(", ") if rest else []
            found[row["question_id"], question.lower()] = tokens
        return found
    rosetta = find_file(folder, "TextVQA_Rosetta_OCR_v0.2_val.json")
    if rosetta is None:
        raise ConfigError(
            f"textvqa with ocr=True: {folder} holds neither llava_textvqa_val_v051_ocr.jsonl nor "
            f"TextVQA_Rosetta_OCR_v0.2_val.json."
        )
    return {(row["image_id"], ""): row["ocr_tokens"] for row in read_json(rosetta)["data"]}


@dataclass(frozen=True, kw_only=True)
class VizWiz(_VQATask):
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
        rows = read_json(told)
        for row in rows:
            needed = ("image", "question", *(("answers",) if self.scored else ()))
            require_columns(row, needed, f"a question in {told}")
            row.setdefault("answers", None)
            row["question_id"] = Path(row["image"]).stem
            row["category"] = row.get("answer_type", "")
        return FileRows(rows, [folder / self.split / row["image"] for row in rows])

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        return Sample(
            id=name,
            question=row["question"],
            image=rows.picture(number),
            answers=_answers(row["answers"]),
            kind=str(row.get("category") or ""),
            cluster=name,
        )


def _answers(value: Any) -> tuple[str, ...]:
    """Return the texts of ``answers``: texts, ``{"answer": text}``, or a dictionary of lists."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return tuple(value["answer"])
    return tuple(item["answer"] if isinstance(item, Mapping) else item for item in value)
