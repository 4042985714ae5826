# SPDX-License-Identifier: Apache-2.0
"""Heads on frozen encoders: trained on what is kept, scored as a user would by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import visprune
from tests.train import small
from visprune.errors import ConfigError
from visprune.train.image.probe import probe
from visprune.train.start import train


def recipe(root: Path, weights: str, **changes: Any) -> dict[str, Any]:
    return {
        "task": "image_probe",
        "batch": 16,
        "epochs": 30,
        "lr": 1e-2,
        "data": {"path": str(root)},
        "rows": [
            {"name": "dense", "weights": weights},
            {"name": "top-k", "weights": weights, "method": "topk", "args": {"keep_ratio": 1.0}},
            {"name": "top-k", "weights": weights, "method": "topk", "args": {"keep_ratio": 0.5}},
        ],
        "heads": [
            {"kind": "linear"},
            {"kind": "efficient_probing", "args": {"num_queries": 4}},
            {"kind": "branches", "args": {"num_branches": 2, "masked_tokens": 4}},
            {"kind": "head_branches", "args": {"num_branches": 2, "num_heads": 2}},
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("probe")
    data = small.make_folder(root / "photos", train=16)
    small.run(small.recipe(data, schedule__epochs=2, augment={}), root / "dense")
    return data, str(root / "dense" / "weights")


def test_heads_are_trained_on_what_is_kept(trained: tuple[Path, str], tmp_path: Path) -> None:
    data, weights = trained
    path = tmp_path / "probe.yaml"
    path.write_text(yaml.safe_dump(recipe(data, weights), sort_keys=False))
    before = small.load_file(Path(weights) / "model.safetensors")
    rows = train(path, tmp_path / "out")["rows"]
    content = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert content["rows"] == json.loads(json.dumps(rows))
    assert content["pictures"] == [48, 18]
    dense, same, pruned = rows
    assert dense["tokens"] == same["tokens"] == 16
    assert pruned["tokens"] < 16
    assert pruned["macs"] < dense["macs"]
    assert list(dense["heads"]) == [
        "linear", "efficient_probing num_queries=4",
        "branches num_branches=2 masked_tokens=4", "head_branches num_branches=2 num_heads=2",
    ]  # fmt: skip
    for name, head in dense["heads"].items():
        assert head["accuracy"] > 60, name  # of three classes
        assert head["change"] == {"delta": 0.0, "low": 0.0, "high": 0.0}
        # Keeping everything: the same tokens, the same head, the same answers.
        assert same["heads"][name] == head
    model, _ = visprune.load_pretrained(weights)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    table = (tmp_path / "out" / "probe.md").read_text()
    assert table.count("\n| ") == 3
    assert "48 for training, 18 pictures scored, 30 epochs" in table


def test_wrong_recipes_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    data, weights = trained
    for changes, match in (
        ({"heads": []}, "must not be empty"),
        ({"epochs": 0}, "at least 1"),
        ({"heads": [{"kind": "liner"}]}, "Did you mean 'linear'"),
        ({"heads": [{"kind": "linear", "args": {"width": 1}}]}, "Head linear: .*width"),
        ({"heads": [{"knid": "linear"}]}, "Did you mean 'kind'"),
    ):
        with pytest.raises(ConfigError, match=match):
            probe(recipe(data, weights, **changes), tmp_path / "out")
