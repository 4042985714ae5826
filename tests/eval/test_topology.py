# SPDX-License-Identifier: Apache-2.0
"""Loops: the published pictures, and drawn ones that have what they are named for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from visprune.errors import ConfigError
from visprune.eval.metrics import floors
from visprune.eval.tasks.base import get_task
from visprune.eval.tasks.topology import KINDS, draw_loops

GOLDEN = Path(__file__).parents[1] / "golden" / "topoperception"
LETTERS = "ABCDE"
# Class -> white regions, holes, nested.
WANTED = {"B": (1, 1, False), "C": (2, 2, False), "D": (2, 2, True)}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    case = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))["cases"][0]
    return {"names": case["names"], "prompt": case["params"]["prompt"],
            **load_file(GOLDEN / "grid29.safetensors")}  # fmt: skip


@pytest.fixture(scope="module")
def published(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files, as they are laid out: RGBA, 29 x 29."""
    root = tmp_path_factory.mktemp("topology")
    for name, cells in zip(golden["names"], golden["images"], strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cells * 255).convert("RGBA").save(root / name)
    return root


def _regions(cells: np.ndarray, value: int) -> np.ndarray:
    """Number the regions of a value, neighbours by sides; 0 elsewhere."""
    found = np.zeros(cells.shape, int)
    for start in zip(*np.nonzero(cells == value), strict=True):
        if found[start]:
            continue
        found[start] = number = found.max() + 1
        queue = [start]
        while queue:
            y, x = queue.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= near[0] < len(cells) and 0 <= near[1] < len(cells)
                if inside and cells[near] == value and not found[near]:
                    found[near] = number
                    queue.append(near)
    return found


def _topology(cells: np.ndarray) -> tuple[int, int, bool]:
    """White regions, black regions off the border, whether one white region encloses another."""
    white, black = _regions(cells, 1), _regions(cells, 0)
    border = {*black[0], *black[-1], *black[:, 0], *black[:, -1]}
    nested = False
    for number in range(1, white.max() + 1):
        # Everything that is cut off from the border when this region alone is a wall.
        rest = _regions((white == number).astype(int), 0)
        outside = {*rest[0], *rest[-1], *rest[:, 0], *rest[:, -1]}
        enclosed = (rest > 0) & ~np.isin(rest, list(outside))
        nested |= bool((enclosed & (white > 0)).any())
    holes = set(range(1, black.max() + 1)) - border
    return int(white.max()), len(holes), nested


def test_the_published_pictures_are_read_with_their_labels(
    golden: dict[str, Any], published: Path
) -> None:
    task = get_task("topology", data=str(published), limit=None)
    samples = task.samples()
    assert len(samples) == 180
    assert [sample.answers[0] for sample in samples[:6]] == ["B", "C", "D", "B", "C", "D"]
    labels = dict(zip(golden["names"], golden["labels"], strict=True))
    pictures = dict(zip(golden["names"], golden["images"], strict=True))
    for sample in samples:
        name = f"data/29/{sample.id}"
        assert sample.answers == (LETTERS[labels[name]],)
        assert np.array_equal(
            np.asarray(sample.image()), pictures[name][..., None].repeat(3, 2) * 255
        )
        assert task.score(sample, task.parse(f"**{sample.answers[0]}**", sample)) == 1.0
    assert task.prompt(samples[0], "chat") == golden["prompt"].rstrip().replace(" \n", "\n")
    direct = get_task("topology", data=str(published / "data/29"), limit=None)
    assert [sample.id for sample in direct.samples()] == [sample.id for sample in samples]


def test_this_test_s_topology_is_that_of_the_published_pictures(golden: dict[str, Any]) -> None:
    columns = [golden[name].tolist() for name in ("components", "holes", "nested")]
    for cells, label, *wanted in zip(golden["images"], golden["labels"], *columns, strict=True):
        assert _topology(cells) == (wanted[0], wanted[1], bool(wanted[2])) == WANTED[LETTERS[label]]


@pytest.mark.parametrize("size", [9, 13, 29, 41])
def test_drawn_pictures_have_the_topology_of_their_class(size: int) -> None:
    task = get_task("topology", size=size, limit=30)
    for sample in task.samples():
        cells = (np.asarray(sample.image())[..., 0] // 255).astype(int)
        assert cells.shape == (size, size)
        assert set(np.unique(cells)) == {0, 1}
        assert _topology(cells) == WANTED[sample.answers[0]], sample.id
        assert sample.kind == KINDS[sample.answers[0]]


def test_drawn_pictures_look_like_the_published_ones_everywhere(golden: dict[str, Any]) -> None:
    """The classes differ in nothing but topology: not in white cells, nor in any small window."""

    def windows(pictures: np.ndarray) -> np.ndarray:
        """Share of each 3 x 3 pattern around the centres of coarse cells."""
        view = np.lib.stride_tricks.sliding_window_view(pictures, (3, 3), axis=(1, 2))[
            :, 1::4, 1::4
        ]
        codes = (view.reshape(*view.shape[:3], 9) * 2 ** np.arange(9)).sum(-1)
        return np.bincount(codes.ravel(), minlength=512) / codes.size

    for letter in KINDS:
        drawn = np.stack([draw_loops(letter, 29, f"{letter} {n}") for n in range(60)]).astype(int)
        theirs = golden["images"][golden["labels"] == LETTERS.index(letter)].astype(int)
        assert set(drawn.sum((1, 2))) == set(theirs.sum((1, 2))) == {392}
        assert set(np.nonzero(windows(drawn))[0]) == set(np.nonzero(windows(theirs))[0])
        sizes = [np.bincount(_regions(cells, 1).ravel())[1:].min() / 392 for cells in drawn]
        least = [np.bincount(_regions(cells, 1).ravel())[1:].min() / 392 for cells in theirs]
        assert min(sizes) >= min(least) - 0.01


def test_draws_are_the_same_everywhere_and_seeds_share_none() -> None:
    assert draw_loops("C", 9, "topology 9/0/1").tolist() == [
        list(map(int, row)) for row in RECORDED.split()
    ]
    first, second = (
        {s.image().tobytes() for s in get_task("topology", limit=60, seed=seed).samples()}
        for seed in (0, 1)
    )
    assert len(first) == len(second) == 60
    assert not first & second


RECORDED = (
    "000000000 011101110 010101010 011101010 000001010 011111010 010000010 011111110 000000000"
)


def test_scale_makes_cells_of_several_pixels() -> None:
    one, four = (
        np.asarray(get_task("topology", size=13, scale=scale).samples()[2].image())
        for scale in (1, 4)
    )
    assert np.array_equal(one.repeat(4, 0).repeat(4, 1), four)


def test_the_commonest_answer_is_right_in_a_third() -> None:
    task = get_task("topology", limit=90)
    found = floors(task, task.samples())
    assert found is not None
    assert found.majority == pytest.approx(100 / 3)
    assert found.prior == pytest.approx(100 / 3)
    assert found.per_kind is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 28}, "size is a multiple of 4, and 1 more"),
        ({"size": 5}, "from 9 on"),
        ({"scale": 0}, "scale is a whole number from 1"),
        ({"limit": None}, "Drawn pictures never end; set limit"),
        ({"data": "x", "size": 13}, "size and scale are of drawn pictures"),
        ({"parser": "lenien"}, "Did you mean 'lenient'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_task("topology", **options)


def test_a_folder_of_other_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat/1.png")
    with pytest.raises(ConfigError, match=r"holds a folder 'cat'; the published ones are named"):
        get_task("topology", data=str(tmp_path)).samples()
