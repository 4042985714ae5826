# SPDX-License-Identifier: Apache-2.0
"""The drawing of what a vision transformer keeps and merges; its benchmark at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.encoders import small
from visprune.errors import ConfigError, VispruneError
from visprune.eval.show.vit import paint_slots, show_vit
from visprune.eval.show.vlm import show
from visprune.eval.speed import bench_vit


def test_tokens_show_their_mean_and_dropped_ones_a_veil() -> None:
    colours = np.zeros((2, 2, 3), np.uint8)
    colours[0], colours[1, 0], colours[1, 1] = [[200, 0, 0], [100, 0, 0]], 40, 90
    picture = Image.fromarray(colours).resize((40, 40), Image.Resampling.NEAREST)
    painted = paint_slots(picture, torch.tensor([[0, 0], [1, -1]]), 20)
    assert painted.shape == (40, 40, 3)
    assert painted[10, 10].tolist() == painted[10, 30].tolist() == [150, 0, 0]
    assert painted[30, 10].tolist() == [40, 40, 40]
    assert painted[30, 30].min() > 190
    assert painted[20, 10].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("method", "params"), [("tome", {"r": 3}), ("topk", {"num_keep": 6})])
def test_the_drawing(method: str, params: dict[str, int], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "p.png")
    out = tmp_path / "kept.png"
    found = show_vit(tmp_path / "p.png", model=small.small(), method=method, out=out, **params)
    assert found["num_tokens"] == 24
    assert found["kept"] == (12 if method == "tome" else 6)
    with Image.open(out) as drawn:
        assert drawn.width > 400


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"timm has no 'deit_smal_patch16_224'. Did you mean"):
        show_vit(tmp_path / "p.png", model="deit_smal_patch16_224")
    with pytest.raises(ConfigError, match=r"acts inside an image encoder; visprune.eval.show.vit"):
        show(tmp_path / "p.png", question="what?", method="tome", out=tmp_path / "o.png")


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--model", "vit_tiny_patch16_224", "--methods", "tome r=8", "topk 0.7"]
    bench_vit.main([*words, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "vit.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["tome r=8", "topk 0.7"]
    for row in rows:
        assert row["promised"] > 1.0
        assert row["speedup"] > 0.0
        assert row["share"] == pytest.approx(row["speedup"] / row["promised"])
        assert row["ideal"] > 0.0
    assert "gave the dense model's bits" in capsys.readouterr().out


def test_no_times_for_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ("tome", {"r": 8}, {"r": 1})
    monkeypatch.setitem(bench_vit.METHODS, "tome r=8", wrong)
    model = bench_vit.build("vit_tiny_patch16_224", depth=2, size=64, device="cpu",
                            dtype=torch.float32)  # fmt: skip
    with pytest.raises(VispruneError, match="keeping everything changes the output"):
        bench_vit.check(model, torch.randn(1, 3, 64, 64), "tome r=8")
    with pytest.raises(ConfigError, match=r"timm has no model 'vit_tinny'"):
        bench_vit.build("vit_tinny", depth=None, size=64, device="cpu", dtype=torch.float32)


def test_the_share_of_attention() -> None:
    model = small.small()
    share = bench_vit.attention_share(model, small.picture(model), rounds=2)
    assert 0.0 < share < 1.0
    assert not any(module._forward_hooks for module in model.modules())


def test_the_benchmark_compiles_what_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: codes.append(f) or f)
    (row,) = bench_vit.measure(
        "vit_tiny_patch16_224", 1, ["tome r=8"], rounds=1, size=64, depth=2, compiled=True
    )
    assert len(codes) == 3  # dense, reduced, and the ideal
    dense, reduced, _ = codes
    tokens = [0, 0]
    for number, model in enumerate((dense, reduced)):
        handle = model.norm.register_forward_hook(
            lambda m, a, o, n=number: tokens.__setitem__(n, o.shape[1])
        )
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
        handle.remove()
    assert tokens == [17, 5]
    assert row["speedup"] > 0
