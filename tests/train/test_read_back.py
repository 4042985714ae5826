# SPDX-License-Identifier: Apache-2.0
"""`visprune eval` reads a trained classifier back: the same pictures, the same accuracy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import visprune
from tests.train import small
from visprune.errors import ConfigError

SYNSETS = ("n02123045", "n01440764", "n02006656")  # not in the order of their numbers' sum


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_folder(tmp_path_factory.mktemp("data") / "photos", val=4)


def scored(weights: Path, data: Path, out: Path) -> dict[str, Any]:
    result = visprune.evaluate(
        str(weights), tasks={"task": "imagenet", "data": str(data)}, methods=[],
        controls=["none"], out=out, progress=False, batch_size=4,
    )  # fmt: skip
    (row,) = result.rows
    return row


@pytest.mark.parametrize("named", ["by word", "by synset"])
def test_with_the_names_of_its_classes(named: str, folder: Path, tmp_path: Path) -> None:
    """Synsets have numbers of their own in ImageNet; the model numbers three classes 0 to 2."""
    root = shutil.copytree(folder, tmp_path / "photos")
    if named == "by synset":
        for name, synset in zip(small.CLASSES, SYNSETS, strict=True):
            for part in ("train", "val"):
                (root / part / name).rename(root / part / synset)
    raw = small.recipe(root, schedule__epochs=4, augment={})
    accuracy = small.run(raw, tmp_path / "run")["validation"]["model"]["accuracy"]
    assert accuracy > 0.6
    row = scored(tmp_path / "run" / "weights", root, tmp_path / "out")
    assert row["n"] == 12
    assert row["score"] == pytest.approx(100 * accuracy)


def test_data_of_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    small.run(small.recipe(folder, schedule__epochs=0.2), tmp_path / "run")
    weights = tmp_path / "run" / "weights"
    root = shutil.copytree(folder / "val", tmp_path / "photos")
    shutil.rmtree(root / "blue")  # fewer classes: the others keep their numbers
    assert scored(weights, root, tmp_path / "fewer")["n"] == 8
    with pytest.raises(ConfigError, match=r"there is no folder .*absent"):
        scored(weights, tmp_path / "absent", tmp_path / "none")
    (root / "red").rename(root / "rad")
    with pytest.raises(ConfigError, match=r"tells 3 classes apart \(blue, green, red .*: rad"):
        scored(weights, root, tmp_path / "other")
