# SPDX-License-Identifier: Apache-2.0
"""Topology: how many closed loops, and does one lie inside the other? No part of a picture tells.

The pictures of TopoPerception (arXiv:2511.11831), and a generator of such pictures of any size. A
loop runs on both sides of a tree of coarse cells: one tree that spans them gives one loop, two
trees give two that lie apart, a connected graph with one cycle gives an outer and an inner one. All
three have the same number of white cells and look alike everywhere.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.metrics.letters import LETTER_PARSERS, parse_letter
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import READING, Parsed, PromptStyle, Sample, Task, check_option
from visprune.eval.tasks.folder import class_folders, in_turn
from visprune.eval.tasks.loading import ImageFile, LazySamples
from visprune.eval.tasks.scoring import score_letter

__all__ = ["KINDS", "Topology", "draw_loops"]

_ASK = (
    "Based on the image provided, which of the following best describes the topological structure "
    "of the white regions?"
)
_OPTIONS = (
    "No closed loops.",
    "A single closed loop.",
    "Two closed loops, neither of which fully contains the other.",
    "Two closed loops, with one completely enclosed inside the other.",
    "Three closed loops.",
)
KINDS = {"B": "one loop", "C": "two loops apart", "D": "two loops nested"}
"""The classes that are published; A and E are only offered as answers."""

# The share of the smaller of two loops in what is white, at least: as in the published pictures,
# where it is 0.10 (apart) and 0.18 (nested). A tiny loop could be found without following a line.
_LEAST = {"B": 0.0, "C": 0.10, "D": 0.18}
_TRIES = 200

Cell = tuple[int, int]
Edge = tuple[Cell, Cell]


@dataclass(frozen=True, kw_only=True)
class Topology(Task):
    """Loops in black-and-white grids (TopoPerception, arXiv:2511.11831), published or drawn.

    Drawn pictures need no data and have any size. Always the commonest answer is right in a third
    of them, a blind guess among the five options in a fifth. Each ``seed`` is a set of its own.

    Args:
        data: the published ``data/29`` (folders ``B``, ``C``, ``D`` with 90 pictures each), or a
            folder that holds it. ``None``: pictures are drawn.
        size: cells of a side of a drawn picture: 9, 13, 17 and so on, 29 as published.
        scale: pixels of a side of a cell; 1 as published.
        limit: number of pictures.
        parser: of :class:`visprune.eval.metrics.LetterMatch`; there is no official one.
    """

    name: ClassVar[str] = "topology"
    VERSION: ClassVar[int] = 1
    metric_name: ClassVar[str] = "letter_match"
    max_new_tokens: ClassVar[int] = 16
    GROUP: ClassVar[str] = READING

    data: str | None = None
    size: int = 29
    scale: int = 1
    limit: int | None = 270
    parser: str = "lenient"

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        super().__post_init__()
        object.__setattr__(self, "data", None if self.data is None else str(self.data))
        check_option(self.name, "parser", self.parser, LETTER_PARSERS)
        if type(self.size) is not int or self.size < 9 or self.size % 4 != 1:
            raise ConfigError(
                f"topology: size is a multiple of 4, and 1 more, from 9 on (9, 13, 17 ... 29), got "
                f"{self.size!r}."
            )
        if type(self.scale) is not int or self.scale < 1:
            raise ConfigError(f"topology: scale is a whole number from 1, got {self.scale!r}.")
        if self.data is None and self.limit is None:
            raise ConfigError("Drawn pictures never end; set limit, such as limit=270.")
        if self.data is not None and (self.size, self.scale) != (29, 1):
            raise ConfigError(
                f"topology: size and scale are of drawn pictures; those in {self.data} are as they "
                f"are. Leave out data, or size and scale."
            )

    def samples(self) -> Sequence[Sample]:
        """Return the pictures' question, the classes in turn.

        Raises:
            ConfigError: ``data`` holds no such folders.
        """
        if self.data is not None:
            return self._published(Path(self.data))
        return LazySamples(self._drawn, range(self.limit or 0))

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question and its options; in the style ``"chat"`` the published words."""
        if style == "chat":
            lines = [_ASK, "Options:", *prompts.option_lines(_OPTIONS)]
            return "\n".join([*lines, "Please select the correct answer from the options above."])
        return prompts.multiple_choice(_ASK, _OPTIONS, style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read a letter by the parser's rules."""
        return Parsed(*parse_letter(text, sample.choices, self.parser))  # type: ignore[arg-type]

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 for the right letter."""
        return score_letter(sample, parsed)

    def _drawn(self, number: int) -> Sample:
        letter = tuple(KINDS)[number % len(KINDS)]
        name = f"{self.size}/{self.seed}/{number}"
        picture = _Drawing(letter, self.size, self.scale, f"topology {name}")
        return _sample(name, letter, picture)

    def _published(self, folder: Path) -> Sequence[Sample]:
        inside = next((p for p in (folder / "29", folder / "data/29") if p.is_dir()), folder)
        found = class_folders(inside)
        strange = sorted(set(found) - set("ABCDE"))
        if strange:
            raise ConfigError(
                f"topology: {inside} holds a folder {strange[0]!r}; the published ones are named "
                f"by their answers, A to E."
            )
        files = in_turn([[(letter, file) for file in files] for letter, files in found.items()])

        def make(number: int) -> Sample:
            letter, file = files[number]
            name = file.relative_to(inside).as_posix()
            return _sample(name, letter, ImageFile(file))

        return LazySamples(make, self._chosen([str(file) for _, file in files]))


def _sample(name: str, letter: str, picture: ImageFile | _Drawing) -> Sample:
    return Sample(
        id=name,
        question=_ASK,
        image=picture,
        answers=(letter,),
        choices=_OPTIONS,
        kind=KINDS.get(letter, letter),
        cluster=name,
    )


@dataclass(frozen=True)
class _Drawing:
    """Draws a picture when called."""

    letter: str
    size: int
    scale: int
    seed: str

    def __call__(self) -> Image.Image:
        cells = draw_loops(self.letter, self.size, self.seed)
        pixels = np.kron(cells, np.full((self.scale, self.scale), 255, np.uint8))
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def draw_loops(letter: str, size: int, seed: str) -> np.ndarray:
    """Draw a grid of a class: 1 where it is white, ``[size, size]`` of uint8.

    Args:
        letter: ``"B"``, ``"C"`` or ``"D"``.
        size: 4 n + 1, n coarse cells a side.
        seed: of the draw; the same text gives the same grid everywhere.
    """
    draw = random.Random(seed)
    side = (size - 1) // 4
    best, share = np.zeros((0, 0), np.uint8), -1.0
    for _ in range(_TRIES):
        cells = _trace(_graph(letter, side, draw), side)
        smaller = _smallest(cells)
        if smaller > share:
            best, share = cells, smaller
        if share >= _LEAST[letter]:
            break
    return best


def _graph(letter: str, side: int, draw: random.Random) -> set[Edge]:
    """Return a spanning tree of the coarse cells (B), less one edge (C), or with one more (D)."""
    edges = [
        ((row, column), (row + down, column + 1 - down))
        for row in range(side)
        for column in range(side)
        for down in (0, 1)
        if row + down < side and column + 1 - down < side
    ]
    # Sorted by random keys, not shuffled: random() alone gives the same numbers in every Python.
    order = sorted(edges, key=lambda edge: (draw.random(), edge))
    parent: dict[Cell, Cell] = {}

    def root(cell: Cell) -> Cell:
        while cell in parent:
            cell = parent[cell]
        return cell

    tree, left = set(), []
    for first, second in order:
        one, other = root(first), root(second)
        if one == other:
            left.append((first, second))
        else:
            parent[one] = other
            tree.add((first, second))
    if letter == "C":
        taken = sorted(tree)
        tree.remove(taken[int(draw.random() * len(taken))])
    elif letter == "D":
        tree.add(left[int(draw.random() * len(left))])
    return tree


def _trace(edges: set[Edge], side: int) -> np.ndarray:
    """Return the loops around a graph of coarse cells, each 2 x 2 corners and what is between."""
    cells = np.zeros((4 * side + 1, 4 * side + 1), np.uint8)
    cells[1::2, 1::2] = 1
    joined = edges | {(second, first) for first, second in edges}
    for row in range(side):
        for column in range(side):
            y, x = 4 * row + 2, 4 * column + 2
            for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                open_side = ((row, column), (row + down, column + right)) in joined
                if not open_side:
                    cells[y + down, x + right] = 1
                elif down:
                    cells[y + 2 * down, [x - 1, x + 1]] = 1
                else:
                    cells[[y - 1, y + 1], x + 2 * right] = 1
    return cells


def _smallest(cells: np.ndarray) -> float:
    """Return the share of the smallest white region in all that is white."""
    white = set(zip(*(places.tolist() for places in np.nonzero(cells)), strict=True))
    total, sizes = len(white), []
    while white:
        queue = deque([white.pop()])
        size = 1
        while queue:
            y, x = queue.popleft()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in white:
                    white.remove(near)
                    queue.append(near)
                    size += 1
        sizes.append(size)
    return min(sizes) / total
