# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ and RefCOCOg: find what an expression refers to; Acc@0.5 of the box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torchmetrics

from visprune.errors import ConfigError
from visprune.eval.metrics.boxes import (
    BOX_PARSERS,
    FRAMES,
    SCALES,
    Box,
    RECAccuracy,
    as_box,
    box_figures,
    iou,
    read_box,
)
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import (
    READING,
    Parsed,
    PromptStyle,
    Sample,
    SampleError,
    Scored,
    check_option,
)
from visprune.eval.tasks.data import DataTask
from visprune.eval.tasks.loading import find_file, jsonl_lines
from visprune.eval.tasks.rows import FileRows, HubRows, ImageLoader, Rows

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

    objects: HubRows
    index: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.index)

    def column(self, name: str) -> list[Any]:
        """Return one text column."""
        values = self.objects.column(name)
        if name == "answer":
            return [values[number][expression] for number, expression in self.index]
        return [values[number] for number, _ in self.index]

    def row(self, number: int) -> Mapping[str, Any]:
        """Return an object with one of its expressions."""
        which, expression = self.index[number]
        row = self.objects.row(which)
        return {**row, "answer": row["answer"][expression]}

    def picture(self, number: int) -> ImageLoader:
        """Return what loads the picture."""
        return self.objects.picture(self.index[number][0])

    def place(self, number: int) -> str:
        """Return where an object stands, for messages."""
        return self.objects.place(self.index[number][0])

    def require(self, needed: Sequence[str]) -> None:
        """Raise ``ConfigError`` unless the objects have these columns."""
        self.objects.require(needed)

    def size(self, number: int, orient: bool) -> tuple[int, int]:
        """Return width and height in pixels: the Hub's rows do not say them."""
        try:
            return self.objects.size(self.index[number][0], orient)
        except SampleError:
            return 1, 1  # whoever asks for the picture gets the error: the sample is not scored


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
            of the picture as Qwen2.5-VL sees it, which resizes all; the prompt asks for 0 to 1 in
            the first case alone.
        min_pixels: for pixels, and needed there: what the study sets as ``min_pixels`` of the
            model's ``processor``, or that processor's own. From it follows what the model saw.
        max_pixels: the same.
        parser: of :func:`visprune.eval.metrics.boxes.parse_box`. Empty: lmms-eval's for ``"unit"``,
            the scale that it scores; else the lenient one, which reads Qwen-VL's pairs too.
        frame: what the numbers are fractions of, where the model is not shown the picture as it is:
            ``"seen"``, what it is shown (a part that was cut out, or a padded square), or
            ``"picture"``, as lmms-eval scores them; see
            :func:`visprune.eval.metrics.boxes.read_box`.
    """

    name: ClassVar[str] = "refcoco_rec"
    metric_name: ClassVar[str] = "rec_acc@0.5"
    max_new_tokens: ClassVar[int] = 48
    GROUP: ClassVar[str] = READING
    SPLITS: ClassVar[Mapping[str, str]] = {n: n for n in ("val", "test", "testA", "testB")}
    COLUMNS: ClassVar[Sequence[str]] = ("question_id", "answer", "bbox")
    TEXTS: ClassVar[Sequence[str]] = ("answer",)
    LAYOUT: ClassVar[str] = "refcoco_val.jsonl"

    split: str = "val"
    dataset: str = "refcoco"
    scale: str = "unit"
    min_pixels: int | None = None
    max_pixels: int | None = None
    parser: str = ""
    frame: str = "seen"

    def __post_init__(self) -> None:
        """Reject an unknown data set or scale, and pixels of a picture of unknown size."""
        super().__post_init__()
        check_option(self.name, "dataset", self.dataset, tuple(_SETS))
        check_option(self.name, "scale", self.scale, SCALES)
        if not self.parser:
            object.__setattr__(self, "parser", "lmms-eval" if self.scale == "unit" else "lenient")
        check_option(self.name, "parser", self.parser, BOX_PARSERS)
        check_option(self.name, "frame", self.frame, FRAMES)
        given = f"got min_pixels={self.min_pixels!r}, max_pixels={self.max_pixels!r}."
        if self.scale != "pixels" and (self.min_pixels, self.max_pixels) != (None, None):
            raise ConfigError(
                f"refcoco_rec takes min_pixels and max_pixels with scale='pixels' alone, {given}"
            )
        if self.scale == "pixels" and not self._limits:
            raise ConfigError(
                f"refcoco_rec with scale='pixels' needs the model's processor's min_pixels and "
                f"max_pixels (1 <= min_pixels <= max_pixels; Qwen2.5-VL as published: 3136 and "
                f"12845056), since boxes are in pixels of the resized picture; {given}"
            )

    @property
    def _limits(self) -> tuple[int, int] | None:
        """``min_pixels`` and ``max_pixels``; ``None`` unless both are usable."""
        low, high = self.min_pixels, self.max_pixels
        if type(low) is not int or type(high) is not int or not 1 <= low <= high:
            return None
        return low, high

    @property
    def _rules(self) -> tuple[Any, Any, Any, Any]:
        """How a box is read: scale, limits of pixels, parser, frame."""
        return self.scale, self._limits, self.parser, self.frame

    @property
    def VERSION(self) -> int:  # type: ignore[override]
        """2 for boxes in pixels, which version 1 read as those of the picture before resizing.

        Also 2 under lmms-eval's rule, for which version 1 had the lenient one.
        """
        return 2 if self.scale == "pixels" or self.parser == "lmms-eval" else 1

    @property
    def HUB(self) -> str:  # type: ignore[override]
        """The Hub's name of the set."""
        return f"lmms-lab-encoder/{_SETS[self.dataset]}"

    def to_dict(self) -> dict[str, Any]:
        """Return name, version and options; those of newer versions only where they matter."""
        told = super().to_dict()
        limits = ("min_pixels", "max_pixels")
        # What other scales asked before there were parsers and frames keeps its identity.
        usual = {("parser", "lenient"), ("frame", "seen")} if self.scale != "unit" else set()
        return {
            name: value
            for name, value in told.items()
            if (name, value) not in usual and (value is not None or name not in limits)
        }

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
        try:
            box, rule = read_box(text, sample.meta, *self._rules)
        except ConfigError as error:
            raise SampleError(f"{sample.id}: {error}") from error
        return Parsed(None if box is None else ",".join(f"{x:.6g}" for x in box), rule)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 where the IoU reaches 0.5."""
        if parsed.answer is None:
            return 0.0
        return float(iou(as_box(parsed.answer.split(",")), as_box(sample.meta["box"])) >= 0.5)

    def metric(self) -> torchmetrics.Metric:
        """Return the metric with this scale."""
        return RECAccuracy(*self._rules)

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

    def _rows(self) -> Rows:
        rows = super()._rows()
        if not isinstance(rows, HubRows) or not len(rows):
            return rows
        rows.require(self.COLUMNS)
        expressions = []
        for number, said in enumerate(rows.column("answer")):
            if not isinstance(said, list):
                raise ConfigError(
                    f"{rows.place(number)}: answer is a list of expressions, got {said!r:.80}."
                )
            expressions += [(number, i) for i in range(len(said))]
        return _Expressions(rows, expressions)

    def _files(self, folder: Path) -> FileRows | None:
        told = find_file(folder, f"{self.dataset}_{self.split}.jsonl")
        if told is None:
            return None
        rows = []
        needed = ("image", "sent", "bbox", "width", "height")
        for number, (where, row) in enumerate(jsonl_lines(told, needed)):
            x0, y0, x1, y1 = _box(row["bbox"], where)
            row |= {
                "question_id": row.get("question_id", number),
                "answer": row["sent"],
                "bbox": [x0, y0, x1 - x0, y1 - y0],  # the Hub's: corner, width, height
                "size": [_side(row, side, where) for side in ("width", "height")],
                "file_name": row["image"],
            }
            rows.append((where, row, folder / str(row["image"])))
        return FileRows.of(rows)

    def _sample(self, number: int, name: str, rows: Rows) -> Sample:
        row = rows.row(number)
        if isinstance(rows, _Expressions):
            width, height = rows.size(number, self.orient)
        else:
            width, height = row["size"]
        x, y, w, h = _box(row["bbox"], rows.place(number))
        return Sample(
            id=name,
            question=row["answer"],
            image=rows.picture(number),
            kind=self.split,
            cluster=str(row.get("file_name") or name),
            meta={
                "box": [x / width, y / height, (x + w) / width, (y + h) / height],
                "size": [width, height],
            },
        )


def _box(value: Any, where: str) -> Box:
    """Return four numbers, or say where they are missing."""
    try:
        return as_box(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: bbox: {error}") from error


def _side(row: Mapping[str, Any], name: str, where: str) -> Any:
    """Return width or height of a row's picture, in pixels."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise ConfigError(f"{where}: {name} is at least 1 pixel, got {value!r:.40}.")
    return value
