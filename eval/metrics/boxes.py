# SPDX-License-Identifier: Apache-2.0
"""Referring expressions: a box read from a model's output, its IoU and Acc@t."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torchmetrics
from torch import Tensor

from visprune.errors import ConfigError
from visprune.eval.metrics.base import check_variant, paired, percent

__all__ = [
    "BOX_PARSERS",
    "FRAMES",
    "THRESHOLDS",
    "Box",
    "BoxFrame",
    "BoxParser",
    "BoxScale",
    "RECAccuracy",
    "box_figures",
    "iou",
    "parse_box",
    "read_box",
    "seen_size",
]

Box = tuple[float, float, float, float]
BoxScale = Literal["unit", "per_mille", "pixels"]
SCALES = ("unit", "per_mille", "pixels")
BoxParser = Literal["lmms-eval", "lenient"]
BOX_PARSERS = ("lmms-eval", "lenient")
BoxFrame = Literal["seen", "picture"]
FRAMES = ("seen", "picture")
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_QWEN_PATCH = 28  # pixels a side of one token: patches of 14, two by two of them merged

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BLANKS = rf"\s*{_NUMBER}\s*"
# lmms-eval's refcoco/utils_rec.py at 75571cf lets no blank stand before a comma.
_PUBLISHED = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")
_BRACKETS = re.compile(rf"\[{_BLANKS},{_BLANKS},{_BLANKS},{_BLANKS}\]")
# Qwen-VL's "<|box_start|>(x,y),(x,y)<|box_end|>".
_PAIRS = re.compile(rf"\({_BLANKS},{_BLANKS}\)\s*,\s*\({_BLANKS},{_BLANKS}\)")
_RULES = {
    "lmms-eval": (("brackets", _PUBLISHED),),
    "lenient": (("brackets", _BRACKETS), ("pairs", _PAIRS)),
}


def parse_box(
    text: str,
    scale: BoxScale = "unit",
    size: tuple[int, int] | None = None,
    parser: BoxParser = "lenient",
) -> tuple[Box | None, str]:
    """Return the first box of an output, corners in [0, 1], and the rule that read it.

    Args:
        text: the output.
        scale: what the model's numbers are: ``"unit"`` (0 to 1: LLaVA), ``"per_mille"`` (0 to 1000:
            Qwen2-VL, Qwen3-VL, InternVL), ``"pixels"`` of the picture the model saw (Qwen2.5-VL).
        size: (width, height) of that picture; for ``"pixels"`` alone.
        parser: ``"lmms-eval"``: four numbers in square brackets, no blank before a comma, as its
            RefCOCO scores; ``"lenient"``: with such blanks too, and pairs of corners.

    Returns:
        ``(x0, y0, x1, y1)`` and ``"brackets"`` (``[a, b, c, d]``) or ``"pairs"``
        (``(a,b),(c,d)``); ``(None, "")`` where there is none.

    Raises:
        ConfigError: unknown scale or parser, or pixels without a size.
    """
    check_variant("RECAccuracy", "scale", scale, SCALES)
    check_variant("RECAccuracy", "parser", parser, BOX_PARSERS)
    if scale == "pixels" and size is None:
        raise ConfigError(
            "Boxes in pixels need the size of the picture that the model saw: size=(width, height)."
        )
    for rule, pattern in _RULES[parser]:
        found = pattern.search(text)
        if found is not None:
            x0, y0, x1, y1 = map(float, found.groups())
            width, height = (1000, 1000) if scale == "per_mille" else (1, 1)
            if scale == "pixels" and size is not None:
                width, height = size
            return (x0 / width, y0 / height, x1 / width, y1 / height), rule
    return None, ""


def read_box(
    text: str,
    meta: Mapping[str, Any],
    scale: BoxScale = "unit",
    limits: tuple[int, int] | None = None,
    parser: BoxParser = "lenient",
    frame: BoxFrame = "seen",
) -> tuple[Box | None, str]:
    """Return the first box of an output in fractions of the picture, and the rule that read it.

    A model that is shown a part of a picture (LLaVA-1.5's processor on the Hub cuts the middle
    out), or a square with the picture in its middle (LLaVA's own evaluation), answers in
    fractions of what it is shown: LLaVA was taught boxes of the padded square. Published scorers,
    lmms-eval's among them, take its numbers for fractions of the picture.

    Args:
        text: the output.
        meta: of the sample: ``size`` (width and height of the picture, for pixels) and ``seen``
            (left, top, right and bottom of what the model was shown, in fractions of the picture;
            without it: the picture).
        scale: see :func:`parse_box`.
        limits: for pixels: ``min_pixels`` and ``max_pixels``, see :func:`seen_size`.
        parser: see :func:`parse_box`.
        frame: what the numbers are fractions of: ``"seen"``, what the model was shown, or
            ``"picture"``, the picture whatever was shown.

    Raises:
        ConfigError: as :func:`parse_box` and :func:`seen_size`.
    """
    check_variant("RECAccuracy", "frame", frame, FRAMES)
    left, top, right, bottom = as_box(
        (frame == "seen" and meta.get("seen")) or (0.0, 0.0, 1.0, 1.0)
    )
    across, down = right - left, bottom - top
    size = None
    if limits is not None and "size" in meta:
        width, height = meta["size"]
        size = seen_size((round(width * across), round(height * down)), *limits)
    box, rule = parse_box(text, scale, size, parser)
    if box is not None:
        x0, y0, x1, y1 = box
        box = left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down
    return box, rule


def seen_size(size: tuple[int, int], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the size of the picture that Qwen2.5-VL sees, and whose pixels its boxes count.

    Its processor resizes a picture to whole tokens of 28 x 28 pixels, as ``smart_resize`` of
    transformers has it.

    Args:
        size: (width, height) of the picture as it is, in pixels.
        min_pixels: the processor's lower limit of width x height.
        max_pixels: its upper limit.

    Returns:
        (width, height) in pixels.

    Raises:
        ConfigError: it takes no picture of that shape.
    """
    # Imported here: it takes seconds, and this scale alone needs it.
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    width, height = size
    try:
        rows, columns = smart_resize(height, width, _QWEN_PATCH, min_pixels, max_pixels)
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"Qwen2.5-VL takes no picture of {width} x {height} pixels: {error}."
        ) from error
    return columns, rows


def iou(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes ``(x0, y0, x1, y1)``.

    As lmms-eval's ``refcoco/utils_rec.py`` at 75571cf, which takes the sides as they come (a box
    whose corners are swapped has a negative side); where the union is not positive it divides by
    zero or flips the sign, and this returns 0.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def _hits(box: Box | None, truth: Box) -> tuple[float, list[bool], bool]:
    """Return IoU, whether it reaches each threshold, and whether the centre lies inside."""
    value = iou(truth, box) if box is not None else 0.0
    # An output without a box is [0, 0, 0, 0] in lmms-eval; its centre is the corner of the picture.
    x0, y0, x1, y1 = box if box is not None else (0.0, 0.0, 0.0, 0.0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    inside = truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]
    return value, [value >= t for t in THRESHOLDS], inside


def box_figures(rows: Sequence[tuple[Box | None, Box]]) -> dict[str, float]:
    """Return the figures of :class:`RECAccuracy` from boxes and truths."""
    if not rows:
        return {}
    hits = [_hits(box, truth) for box, truth in rows]
    count = len(rows)
    at = {t: percent(sum(hit[1][i] for hit in hits), count) for i, t in enumerate(THRESHOLDS)}
    return {
        "score": at[0.5],
        "iou": percent(sum(hit[0] for hit in hits), count),
        **{f"acc@{t}": value for t, value in at.items()},
        "center": percent(sum(hit[2] for hit in hits), count),
        "unparsed": percent(sum(box is None for box, _ in rows), count),
    }


class RECAccuracy(torchmetrics.Metric):
    """Acc@0.5 (``score``), Acc@0.1 to 0.9, mean IoU and centre accuracy, in percent.

    References are boxes ``(x0, y0, x1, y1)`` in [0, 1], or samples whose ``meta`` holds ``box``
    (and ``size`` and ``seen``, see :func:`read_box`).

    Args:
        scale: what the model's numbers are; see :func:`parse_box`.
        limits: for pixels and samples: ``min_pixels`` and ``max_pixels`` of the processor of
            Qwen2.5-VL, see :func:`seen_size`; ``None``: ``update`` is told the sizes.
        parser: how a box is read; see :func:`parse_box`.
        frame: what the numbers are fractions of; see :func:`read_box`.

    Raises:
        ConfigError: unknown scale, parser or frame.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    sums: Tensor
    count: Tensor

    def __init__(
        self,
        scale: BoxScale = "unit",
        limits: tuple[int, int] | None = None,
        parser: BoxParser = "lenient",
        frame: BoxFrame = "seen",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_variant("RECAccuracy", "scale", scale, SCALES)
        check_variant("RECAccuracy", "parser", parser, BOX_PARSERS)
        check_variant("RECAccuracy", "frame", frame, FRAMES)
        self.scale: BoxScale = scale
        self.parser: BoxParser = parser
        self.frame: BoxFrame = frame
        self.limits = limits
        self._names = tuple(box_figures([(None, (0.0, 0.0, 1.0, 1.0))]))
        zeros = torch.zeros(len(self._names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Add outputs and boxes.

        Args:
            predictions: outputs of the model.
            references: boxes in [0, 1], or samples.
            sizes: (width, height) of each picture as the model saw it; for the scale ``"pixels"``
                alone.

        Raises:
            ConfigError: lengths differ, a reference is no box, or what the model saw is not known.
        """
        pairs = paired(predictions, references)
        for number, (text, reference) in enumerate(pairs):
            meta = getattr(reference, "meta", {})
            if sizes is not None:
                box, _ = parse_box(text, self.scale, sizes[number], self.parser)
            else:
                box, _ = read_box(text, meta, self.scale, self.limits, self.parser, self.frame)
            figures = box_figures([(box, as_box(meta.get("box", reference)))])
            self.sums += self.sums.new_tensor([figures[name] for name in self._names])
        self.count += len(pairs)

    def compute(self) -> dict[str, float]:
        """Return the figures; NaN before any update."""
        count = int(self.count)
        values = [value / count if count else float("nan") for value in self.sums.tolist()]
        return dict(zip(self._names, values, strict=True))


def as_box(value: Any) -> Box:
    """Return four numbers as a box.

    Raises:
        ConfigError: it is not four numbers.
    """
    try:
        x0, y0, x1, y1 = map(float, value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"A box is four numbers x0, y0, x1, y1, got {value!r}.") from error
    return x0, y0, x1, y1
