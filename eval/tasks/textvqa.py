# SPDX-License-Identifier: Apache-2.0
"""TextVQA: questions about text in pictures, with or without an OCR system's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from visprune.errors import ConfigError
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import READING, PromptStyle, Sample
from visprune.eval.tasks.loading import find_file, jsonl_lines, read_rows
from visprune.eval.tasks.rows import FileRows, Rows
from visprune.eval.tasks.vqa import VQATask, answers_of

__all__ = ["TextVQA"]

_OCR = "Reference OCR token: "


@dataclass(frozen=True, kw_only=True)
class TextVQA(VQATask):
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
    GROUP: ClassVar[str] = READING
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
        tokens = _ocr_tokens(folder) if self.ocr else {}
        rows = []
        for where, row in read_rows(told, self.COLUMNS, "data"):
            picture, question = str(row["image_id"]), str(row["question"]).lower()
            row["answers"] = answers_of(row["answers"], where)
            if self.ocr:
                row["ocr_tokens"] = tokens.get((picture, question), tokens.get((picture, ""), []))
            rows.append((where, row, folder / f"train_images/{picture}.jpg"))
        return FileRows.of(rows)

    def _check(self, rows: Rows, wanted: Sequence[int]) -> None:
        super()._check(rows, wanted)
        if self.ocr:
            rows.require(("ocr_tokens",))

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        meta = {"ocr_tokens": list(row["ocr_tokens"])} if self.ocr else {}
        return dataclasses.replace(self._asked(number, name, rows, row), meta=meta)


def _ocr_tokens(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Return OCR tokens by picture and question (LLaVA's file) or by picture (Rosetta's)."""
    llava = find_file(folder, "llava_textvqa_val_v051_ocr.jsonl")
    if llava is not None:
        found = {}
        for _, row in jsonl_lines(llava, ("question_id", "text")):
            question, _, rest = str(row["text"]).partition(f"\n{_OCR}")
            tokens = rest.partition("\n")[0].split(", ") if rest else []
            found[str(row["question_id"]), question.lower()] = tokens
        return found
    rosetta = find_file(folder, "TextVQA_Rosetta_OCR_v0.2_val.json")
    if rosetta is None:
        raise ConfigError(
            f"textvqa with ocr=True: {folder} holds neither llava_textvqa_val_v051_ocr.jsonl nor "
            f"TextVQA_Rosetta_OCR_v0.2_val.json."
        )
    listed = read_rows(rosetta, ("image_id", "ocr_tokens"), "data")
    return {(str(row["image_id"]), ""): list(map(str, row["ocr_tokens"])) for _, row in listed}
