# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ and RefCOCOg: find what an expression refers to; Acc@0.5 of the box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torchmetrics

from visprune.eval import prompts
from visprune.eval.metrics.boxes import SCALES, RECAccuracy, as_box, box_figures, iou, parse_box
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, SampleError, Scored, check_option
from visprune.eval.tasks.data import DataTask, FileRows, Picture, Rows
from visprune.eval.tasks.loading import find_file, read_jsonl, require_columns

__all__ = ["RefCOCO"]

_ASK = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
    "bottom-right y). All values are floating point numbers bounded between 0 and 1. Please "
    "provide the bounding box coordinate of the region this sentence describes: "
)
_SETS = {
    "refcoco": "RefCOCO",
    "refcoco+": "RefCOCOplus",
    "refcocog": "RefCOCOg",
}


@dataclass(frozen=True)
class _Expressions:
    """One row per expression; the Hub has one per object, with a list of expressions."""

    objects: Rows
    index: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.index)

    def column(self, name: str) -> list[Any]:
        """Return one text column."""
        values = self.objects.column(name)
        return [values[number] for number, _ in self.index]

    def row(self, number: int) -> Mapping[str, Any]:
        """Return an object with one of its expressions."""
        which, expression = self.index[number]
        row = self.objects.row(which)
        return {**row, "answer": row["answer"][expression]}

    def picture(self, number: int) -> Picture:
        """Return what loads the picture."""
        return self.objects.picture(self.index[number][0])


@dataclass(frozen=True, kw_only=True)
class RefCOCO(DataTask):
    """RefCOCO, RefCOCO+, RefCOCOg (arXiv:1608.00272): box of an expression, Acc@0.5.

    A folder holds ``refcoco_val.jsonl`` and so on with ``image``, ``sent``, ``bbox`` (x0, y0, x1,
    y1 in pixels), ``width``, ``height``, as Qwen-VL's evaluation uses; pictures lie relative to the
    folder.

    Args:
        dataset: ``"refcoco"``, ``"refcoco+"`` or ``"refcocog"``.
        split: ``"val"``, ``"testA"``, ``"testB"`` (RefCOCOg: ``"val"``, ``"test"``).
        scale: what the model's numbers are: ``"unit"`` (0 to 1), ``"per_mille"``, ``"pixels"``
            of the whole picture; the prompt asks for 0 to 1 in the first case alone.
    """

    name: ClassVar[str] = "refcoco_rec"
    VERSION: ClassVar[int] = 1
    metric_name: ClassVar[str] = "rec_acc@0.5"
    max_new_tokens: ClassVar[int] = 48
    SPLITS: ClassVar[Mapping[str, str]] = {n: n for n in ("val", "test", "testA", "testB")}
    COLUMNS: ClassVar[Sequence[str]] = ("question_id", "answer", "bbox")
    LAYOUT: ClassVar[str] = "refcoco_val.jsonl"

    split: str = "val"
    dataset: str = "refcoco"
    scale: str = "unit"

    def __post_init__(self) -> None:
        """Reject an unknown data set or scale."""
        super().__post_init__()
        check_option(self.name, "dataset", self.dataset, tuple(_SETS))
        check_option(self.name, "scale", self.scale, SCALES)

    @property
    def HUB(self) -> str:  # type: ignore[override]
        """The Hub's name of the set."""
        return f"lmms-lab-encoder/{_SETS[self.dataset]}"

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return lmms-eval's request; without its numbers from 0 to 1 for other scales."""
        prompts.check_style(style)
        if style == "plain":
            return sample.question
        if self.scale == "unit":
            return _ASK + sample.question
        return f"Output the bounding box of the region this sentence describes: {sample.question}"

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read the first box (``"brackets"`` or ``"pairs"``); the answer is ``x0,y0,x1,y1``."""
        size = self._size(sample) if self.scale == "pixels" else None
        box, rule = parse_box(text, self.scale, size)  # type: ignore[arg-type]
        return Parsed(None if box is None else ",".join(f"{x:.6g}" for x in box), rule)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 where the IoU reaches 0.5."""
        if parsed.answer is None:
            return 0.0
        return float(iou(as_box(parsed.answer.split(",")), as_box(sample.meta["box"])) >= 0.5)

    def metric(self) -> torchmetrics.Metric:
        """Return the metric with this scale."""
        return RECAccuracy(scale=self.scale)  # type: ignore[arg-type]

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return ``score`` (Acc@0.5), Acc@0.1 to 0.9, mean IoU and centre accuracy."""
        rows = [
            (as_box(r.answer.split(",")) if r.answer else None, as_box(r.meta["box"]))
            for r in records
            if r.score is not None or errors_count_as_wrong
        ]
        return box_figures(rows)

    def _size(self, sample: Sample) -> tuple[int, int]:
        width, height = sample.meta["size"]
        return int(width), int(height)

    def _rows(self) -> Rows:
        rows = super()._rows()
        if isinstance(rows, FileRows) or "answer" not in rows.row(0):
            return rows
        expressions = [
            (number, i)
            for number, said in enumerate(rows.column("answer"))
            for i in range(len(said))
        ]
        return _Expressions(rows, expressions)

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, f"{self.dataset}_{self.split}.jsonl")
        if told is None:
            return None
        rows = read_jsonl(told)
        for number, row in enumerate(rows):
            needed = ("image", "sent", "bbox", "width", "height")
            require_columns(row, needed, f"{told}, row {number}")
            x0, y0, x1, y1 = as_box(row["bbox"])
            row |= {
                "question_id": row.get("question_id", number),
                "answer": row["sent"],
                "bbox": [x0, y0, x1 - x0, y1 - y0],  # the Hub's: corner, width, height
                "size": [row["width"], row["height"]],
                "file_name": row["image"],
            }
        return FileRows(rows, [folder / row["image"] for row in rows])

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        picture = rows.picture(number)
        width, height = row["size"] if "size" in row else _size_of(picture)
        x, y, w, h = as_box(row["bbox"])
        return Sample(
            id=name,
            question=row["answer"],
            image=picture,
            kind=self.split,
            cluster=str(row.get("file_name") or name),
            meta={
                "box": [x / width, y / height, (x + w) / width, (y + h) / height],
                "size": [width, height],
            },
        )


def _size_of(picture: Picture) -> tuple[int, int]:
    """Return width and height: the Hub's rows do not say them, and their boxes are in pixels."""
    try:
        return picture().size
    except SampleError:
        return 1, 1  # whoever asks for the picture gets the error, and this sample is not scored
