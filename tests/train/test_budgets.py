# SPDX-License-Identifier: Apache-2.0
"""The comparison of budgets scores and prices what a user would measure by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import visprune
from tests.train import small
from visprune.errors import ConfigError
from visprune.train.image import budgets
from visprune.train.image.budgets import measure
from visprune.train.image.recipe import DataConfig


def test_rows_are_scored_priced_and_drawn(tmp_path: Path) -> None:
    root = small.make_folder(tmp_path / "photos", train=8)
    small.run(small.recipe(root, schedule__epochs=4, augment={}), tmp_path / "dense")
    weights = str(tmp_path / "dense" / "weights")
    model, _ = visprune.load_pretrained(weights)
    visprune.save_pretrained(visprune.prune(model, "evit", keep_ratio=0.5), tmp_path / "evit")
    raw = {
        "task": "image_budgets",
        "batch": 7,
        "rounds": 2,
        "data": {"path": str(root)},
        "rows": [
            {"name": "dense", "weights": weights},
            {"name": "ToMe", "weights": weights, "method": "tome", "args": {"r": 0}},
            {"name": "ToMe", "weights": weights, "method": "tome", "args": {"r": 3}},
            {"name": "EViT", "weights": str(tmp_path / "evit"), "tuned": True},
        ],
    }
    measure(raw, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "budgets.json").read_text())
    rows = content["rows"]
    assert content["pictures"] == 18
    assert content["environment"]["cpu"]
    assert [row["label"] for row in rows] == [
        "dense",
        "ToMe r=0",
        "ToMe r=3",
        "EViT keep_ratio=0.5",
    ]
    dense, same, merged, evit = rows
    assert dense["accuracy"] == same["accuracy"]
    assert same["change"] == {"delta": 0.0, "low": 0.0, "high": 0.0}
    assert merged["macs"] < same["macs"]
    assert abs(dense["macs"] / same["macs"] - 1) < 1e-3  # counted by PyTorch, and by us
    assert all(row["images_per_s"] > 0 for row in rows)
    model, run = visprune.load_pretrained(tmp_path / "evit")
    transform_free = [small.picture(label, 1000 + i) for label in range(3) for i in range(6)]
    pixels = torch.stack([_pixels(picture) for picture in transform_free])
    labels = torch.arange(3).repeat_interleave(6)
    with torch.no_grad():
        right = float((model(pixels).argmax(-1) == labels).float().mean())
    assert evit["accuracy"] == pytest.approx(100 * right)
    assert run is not None
    assert run.cost().macs // 18 == evit["macs"]
    table = (tmp_path / "out" / "budgets.md").read_text()
    assert "| EViT keep_ratio=0.5 | yes |" in table
    assert (tmp_path / "out" / "budgets.png").stat().st_size > 5000


def _pixels(picture: small.Image.Image) -> torch.Tensor:
    from torchvision.transforms.functional import to_tensor

    return to_tensor(picture) * 2 - 1  # mean and standard deviation 0.5


@dataclass
class SlowAtFirst:
    """A row whose model takes its time in the first forward after a method was attached."""

    new: bool = False

    @contextmanager
    def around(self) -> Iterator[None]:
        self.new = True
        yield

    def model(self, images: torch.Tensor) -> torch.Tensor:
        if self.new:
            time.sleep(0.2)
        self.new = False
        return images


def test_the_first_forward_after_attaching_is_not_timed(tmp_path: Path) -> None:
    recipe = budgets.BudgetsRecipe(DataConfig(path=str(tmp_path)), [], rounds=2)
    (found,) = budgets._time([SlowAtFirst()], torch.zeros(2, 3), recipe)  # type: ignore[list-item]
    assert found["images_per_s"] > 2 / 0.1


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    root = small.make_folder(tmp_path / "photos", train=2, val=1)
    raw = {"data": {"path": str(root)}, "rows": [{"name": "x", "weigths": "y"}]}
    with pytest.raises(ConfigError, match="Did you mean 'weights'"):
        measure(raw, tmp_path / "out")
    with pytest.raises(ConfigError, match="rows must not be empty"):
        measure({**raw, "rows": []}, tmp_path / "out")
    with pytest.raises(ConfigError, match="neither a folder nor"):
        measure({**raw, "rows": [{"name": "x", "weights": "nowhere"}]}, tmp_path / "out")
