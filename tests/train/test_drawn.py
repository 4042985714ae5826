# SPDX-License-Identifier: Apache-2.0
"""What the README trains from a clone: recipes whose pictures are drawn by code."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from visprune.cli import commands as cli
from visprune.errors import ConfigError
from visprune.eval.tasks.embedded.scene import SHAPES
from visprune.train.image.drawn import DrawnPictures
from visprune.train.image.recipe import DataConfig
from visprune.train.image.sources import open_pictures

ROOT = Path(__file__).parents[2]


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["visprune", *words])
    try:
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_parts_share_no_picture_and_classes_are_even() -> None:
    train, val = (open_pictures(DataConfig("drawn:48"), part) for part in ("train", "val"))
    assert (len(train), len(val)) == (48, 12)
    assert train.classes == val.classes == list(SHAPES)
    assert np.bincount(train.labels).tolist() == [8] * 6
    pixels = {train.read(i).tobytes() for i in range(48)} | {
        val.read(i).tobytes() for i in range(12)
    }
    assert len(pixels) == 60
    assert (
        train.read(3).tobytes() == open_pictures(DataConfig("drawn:48"), "train").read(3).tobytes()
    )
    assert train.read(0).size == (64, 64)


@pytest.mark.parametrize("path", ["drawn:", "drawn:x", "drawn:5"])
def test_other_counts_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"drawn:N.* such as drawn:1200"):
        DrawnPictures(path, "train")
    with pytest.raises(ConfigError, match=r"parts train, val, test"):
        DrawnPictures("drawn:48", "vall")


def test_the_readme_s_two_commands_train_from_a_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    found = [
        line.partition("#")[0].split()
        for line in lines
        if line.startswith("visprune train configs")
    ]
    assert [words[2] for words in found] == [
        "configs/train/vit_drawn.yaml", "configs/train/evit_drawn.yaml",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = ["data.path=drawn:48", "batch=24", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    # The second starts from what the first wrote, and says so where it is not there.
    assert command(monkeypatch, *found[1][1:], *short) == 2
    assert "visprune train RECIPE.yaml --out runs/vit_drawn" in capsys.readouterr().err
    for words in found:
        assert command(monkeypatch, *words[1:], *short) == 0
    assert (tmp_path / "runs/evit_drawn/weights/visprune.json").is_file()


def test_the_readme_s_first_evaluation_is_short_and_says_what_all_of_it_takes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(line for line in text.split("\n") if line.startswith("visprune eval "))
    assert "--limit 140" in first
    assert "14,700" in text, "what the whole test set takes is said"
