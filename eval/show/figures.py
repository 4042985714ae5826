# SPDX-License-Identifier: Apache-2.0
"""Drawings of the demo and of `visprune show`. Colours are Okabe and Ito's, shapes differ too."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["Panel", "accuracy_flops", "contact_sheet", "shown_picture"]

_STYLE = {
    "keep_all": ("#000000", "*"),
    "todre": ("#D55E00", "o"),
    "divprune": ("#0072B2", "s"),
    "fastv": ("#009E73", "D"),
    "visionzip": ("#CC79A7", "P"),
    "pyramiddrop": ("#56B4E9", "X"),
    "pool": ("#E69F00", "^"),
    "random": ("#777777", "v"),
}
_SPARE = (("#56B4E9", "h"), ("#CC79A7", "<"), ("#F0E442", ">"), ("#444444", "p"))
_RIGHT, _WRONG, _PLAIN = "#00734F", "#B34700", "#333333"


@dataclass(frozen=True)
class Panel:
    """One painted picture and what stands below it.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        text: caption.
        right: whether the answer in it is right; ``None`` where nobody knows.
    """

    image: np.ndarray
    text: str
    right: bool | None = None


def accuracy_flops(
    rows: Sequence[Mapping[str, Any]], path: Path, *, floor: float, vision_gflops: float, note: str
) -> None:
    """Plot accuracy against operations, one line per method, with its intervals.

    Args:
        rows: the rows of the demo.
        path: PNG to write.
        floor: accuracy of a model that sees nothing, in [0, 1].
        vision_gflops: what the vision tower alone costs: no method here gets below it.
        note: a line for under the plot: what was measured.
    """
    figure = Figure(figsize=(8.6, 5.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["method"] for row in rows))
    for order, name in enumerate(names):
        mine = sorted((r for r in rows if r["method"] == name), key=lambda r: r["gflops"])
        _line(axes, name, mine, order)
    _references(axes, rows, floor, vision_gflops)
    axes.set_xlabel("GFLOPs per question: vision tower, projector, selection, prefill, output head")
    axes.set_ylabel("accuracy (%)")
    axes.set_title("Accuracy against operations", loc="left", weight="bold")
    axes.grid(color="#E9E9EE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Nothing happens between zero and the tower; its line says how far away zero is.
    axes.set_xlim(left=0.93 * vision_gflops)
    bottom = min(100 * floor, *(100 * row["ci95"][0] for row in rows))
    top = max(100 * floor, *(100 * row["ci95"][1] for row in rows))
    axes.set_ylim(max(0.0, bottom - 4), max(min(101.0, top + 4), bottom + 10))
    budgets = sorted({row["num_keep"] for row in rows if row["method"] != "keep_all"}, reverse=True)
    axes.legend(
        loc="lower right", framealpha=0.95, edgecolor="#DDDDDD", fontsize=9, title_fontsize=8,
        title=f"visual tokens kept,\nright to left: {', '.join(map(str, budgets))}",
    )  # fmt: skip
    legend = "Bars: 95 % intervals. Blind floor: the commonest answer of each kind."
    _footnote(figure, f"{legend} {note}", 140, 7.5)
    figure.savefig(path)


def _footnote(figure: Figure, text: str, width: int, size: float) -> None:
    figure.supxlabel(textwrap.fill(text, width), fontsize=size, color="#666666", x=0.01, ha="left")


def _look(name: str, order: int = 0) -> tuple[str, str]:
    return _STYLE.get(name, _SPARE[order % len(_SPARE)])


def _line(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], order: int) -> None:
    color, marker = _look(name, order)
    x = [row["gflops"] for row in rows]
    y = [100 * row["accuracy"] for row in rows]
    low = [100 * (row["accuracy"] - row["ci95"][0]) for row in rows]
    high = [100 * (row["ci95"][1] - row["accuracy"]) for row in rows]
    axes.errorbar(
        x, y, yerr=[low, high], color=color, linewidth=0, elinewidth=4, alpha=0.22, zorder=2
    )  # fmt: skip
    axes.plot(
        x, y, color=color, marker=marker, label=name, linewidth=1.6, zorder=3,
        markersize=14 if marker == "*" else 7, markeredgecolor="white", markeredgewidth=0.8,
    )  # fmt: skip


def _references(
    axes: Axes, rows: Sequence[Mapping[str, Any]], floor: float, vision_gflops: float
) -> None:
    """Draw keep-all's height, the blind floor, the vision tower, and name the budgets."""
    whole = [100 * row["accuracy"] for row in rows if row["method"] == "keep_all"]
    if whole:
        axes.axhline(whole[0], color="#000000", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.axhline(100 * floor, color="#888888", linewidth=1.1, linestyle=":", zorder=1)
    axes.axvline(vision_gflops, color="#888888", linewidth=1.1, linestyle=":", zorder=1)
    style: dict[str, Any] = {"color": "#666666", "fontsize": 8, "textcoords": "offset points"}
    axes.annotate(
        f"blind floor {100 * floor:.1f} %", (vision_gflops, 100 * floor), xytext=(6, -11), **style
    )  # fmt: skip
    axes.annotate(
        f"vision tower alone: {vision_gflops:.2f}", (vision_gflops, 0.98), va="top", rotation=90,
        xycoords=axes.get_xaxis_transform(), xytext=(-11, 0), **style,
    )  # fmt: skip


def contact_sheet(
    original: Panel, panels: Mapping[str, Sequence[Panel]], budgets: Sequence[int], path: Path,
    *, title: str, note: str, about: Mapping[str, str],
) -> None:  # fmt: skip
    """Draw the same picture as each method leaves it at each budget.

    Args:
        original: the picture, whole, with what the unpruned model answers.
        panels: for every method, one panel per budget.
        budgets: tokens kept, the columns.
        path: PNG to write.
        title: the question.
        note: how to read the sheet.
        about: one line on every method.
    """
    rows, columns = len(panels) + 1, max(2, len(budgets) + 1)
    spacing = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(2.25 * columns, 2.42 * rows + 0.2), dpi=110, layout=spacing)
    grid = figure.subplots(rows, columns, squeeze=False)
    _show(grid[0, 0], original)
    for axes in (*grid[0, 1:], *grid[1:, 0]):
        axes.set_axis_off()
    _write(grid[0, 1], 0.96, title, fontsize=15, weight="bold")
    _write(grid[0, 1], 0.80, textwrap.fill(note, 88), fontsize=10.5, color=_PLAIN, linespacing=1.45)
    for row, (name, line) in enumerate(panels.items(), start=1):
        _write(grid[row, 0], 0.96, name, fontsize=14, weight="bold", color=_look(name, row)[0])
        _write(grid[row, 0], 0.82, textwrap.fill(about[name], 25), fontsize=9.5, color=_PLAIN)
        for column, panel in enumerate(line, start=1):
            _show(grid[row, column], panel)
            if row == 1:
                grid[row, column].set_title(f"{budgets[column - 1]} tokens", fontsize=11)
    figure.savefig(path)


def _write(axes: Axes, height: float, text: str, **style: Any) -> None:
    """Write text into an empty cell; it may run over its neighbours to the right."""
    written = axes.text(0.0, height, text, transform=axes.transAxes, va="top", **style)
    written.set_in_layout(False)


def shown_picture(
    original: Panel, regions: Sequence[Panel], path: Path, *, title: str, note: str
) -> None:
    """Draw a picture beside what a model still sees of it.

    Args:
        original: the picture, with the unpruned answer.
        regions: the painted regions (one, or thumbnail and full grid).
        path: PNG to write.
        title: the question.
        note: method and counts.
    """
    panels = [original, *regions]
    shapes = [panel.image.shape[1] / panel.image.shape[0] for panel in panels]
    height = min(5.0, 18.0 / sum(shapes))  # wide pictures: no drawing of half a metre
    widths = [height * shape for shape in shapes]
    width = max(8.0, sum(widths) + 0.4)
    figure = Figure(figsize=(width, height + 1.3), dpi=120, layout="constrained")
    title = textwrap.fill(title, int(7 * width))
    figure.suptitle(title, fontsize=14, weight="bold", x=0.01, ha="left")
    _footnote(figure, note, int(13 * width), 9.5)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)
    for axes, panel, inches in zip(grid[0], panels, widths, strict=True):
        text = textwrap.fill(textwrap.shorten(panel.text, 160, placeholder=" ..."), int(9 * inches))
        _show(axes, Panel(panel.image, text, panel.right), size=12)
    figure.savefig(path)


def _show(axes: Axes, panel: Panel, size: float = 9.5) -> None:
    axes.imshow(panel.image, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#BBBBBB")
    mark = {True: "  ✓", False: "  ✗", None: ""}[panel.right]
    color = {True: _RIGHT, False: _WRONG, None: _PLAIN}[panel.right]
    axes.set_xlabel(panel.text + mark, fontsize=size, color=color)
