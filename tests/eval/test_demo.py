# SPDX-License-Identifier: Apache-2.0
"""The demo: what it writes, that its numbers hang together, and that its short cuts are exact."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.small import small_embedded
from visprune.errors import ConfigError
from visprune.eval.demo import run as demo
from visprune.eval.demo.run import DemoGrid, run_demo
from visprune.eval.demo.sheet import most_typical
from visprune.eval.models.base import Request
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.report import write_report
from visprune.eval.show.kept import KeptMap, kept_of, paint
from visprune.eval.stats import wilson
from visprune.eval.tasks.embedded import blind_floor, load
from visprune.eval.tasks.embedded.task import EmbeddedTask
from visprune.machine.run import prune

GRID = DemoGrid(methods=("random", "pool", "fastv"), budgets=(64, 32), limit=14, prompts=2)
REQUIRED = {
    *("method", "num_keep", "accuracy", "ci95", "delta", "tokens_mean", "gflops", "prefill_ms"),
    *("speedup", "kv_mib"),
}


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return small_embedded()


@pytest.fixture(scope="module")
def vlm(small: tuple[Any, Any]) -> VLM:
    return VLM(*small, name="embedded", template=PLAIN, style="plain")


def inputs_of(vlm: VLM, count: int = 1) -> dict[str, Any]:
    """The first questions, with their pictures."""
    task = EmbeddedTask(limit=count)
    return vlm.inputs([Request(s, s.question, s.image()) for s in task.samples()], "plain")


@pytest.fixture(scope="module")
def written(small: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    run_demo(out, threads=1, grid=GRID, model=small)
    return out


@pytest.fixture(scope="module")
def rows(written: Path) -> list[dict[str, Any]]:
    return json.loads((written / "demo.json").read_text(encoding="utf-8"))


def test_rows_are_the_methods_at_the_budgets(rows: list[dict[str, Any]]) -> None:
    named = [(row["method"], row["num_keep"]) for row in rows]
    wanted = [("keep_all", 576)] + [(m, k) for m in GRID.methods for k in GRID.budgets]
    assert named == wanted
    assert all(set(row) >= REQUIRED for row in rows)


def test_numbers_of_a_row_hang_together(rows: list[dict[str, Any]]) -> None:
    base = rows[0]
    for row in rows:
        right = round(row["accuracy"] * row["n"])
        assert row["n"] == 14
        assert row["ci95"] == pytest.approx(wilson(right, 14))
        assert row["delta"] == pytest.approx(row["accuracy"] - base["accuracy"])
        assert row["delta_ci95"][0] <= row["delta"] <= row["delta_ci95"][1]
        assert sum(row["gflops_parts"].values()) == pytest.approx(row["gflops"])
        assert row["gflops_parts"]["vision"] == base["gflops_parts"]["vision"] > 0
        assert row["prefill_ms"] > 0
    assert base["tokens_mean"] == 576
    assert base["delta"] == 0
    for row in rows[1:]:
        assert row["gflops"] < base["gflops"]
        assert row["kv_mib"] < base["kv_mib"]


def test_tokens_and_cache_are_the_schedules(rows: list[dict[str, Any]]) -> None:
    by = {(row["method"], row["num_keep"]): row for row in rows}
    assert by["random", 64]["tokens_mean"] == 64
    assert by["pool", 32]["tokens_mean"] == 30  # 5 x 6 cells
    assert by["fastv", 64]["tokens_mean"] == (2 * 576 + 6 * 64) / 8
    # 8 layers, keys and values, 32 numbers, 4 bytes: 2 KiB for each token of the cache.
    dropped = by["keep_all", 576]["kv_mib"] - by["random", 64]["kv_mib"]
    assert dropped == pytest.approx((576 - 64) * 2 / 1024)


def test_the_csv_says_the_same(written: Path, rows: list[dict[str, Any]]) -> None:
    with (written / "demo.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [row["method"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert float(line["gflops"]) == row["gflops"]
        assert float(line["ci95_low"]) == row["ci95"][0]
        assert float(line["delta_ci95_high"]) == row["delta_ci95"][1]


def test_run_json_says_what_it_ran_on(written: Path) -> None:
    context = json.loads((written / "run.json").read_text(encoding="utf-8"))
    assert context["keep_all_equals_untouched_to_the_bit"] is True
    assert context["threads"] == 1
    assert context["seeds"] == {"random": 0, "bootstrap": 0}
    assert context["blind_floor"] == blind_floor(load("test", 14))
    assert context["cpu"]
    assert context["command"]
    assert {"torch", "transformers", "visprune"} <= set(context["versions"])


def test_pictures_are_drawn(written: Path) -> None:
    for name in ("accuracy_flops.png", "contact_sheet.png"):
        with Image.open(written / name) as picture:
            assert min(picture.size) > 400
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_everything_but_the_times_is_deterministic(
    small: tuple[Any, Any], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    again = run_demo(tmp_path, threads=1, grid=GRID, model=small)
    timed = ("prefill_ms", "prefill_iqr_ms", "speedup")
    for first, second in zip(rows, again, strict=True):
        assert all(math.isfinite(second[key]) for key in timed)
        assert {k: v for k, v in first.items() if k not in timed} == {
            k: v for k, v in second.items() if k not in timed
        }


def test_the_table_names_the_floor_and_the_machine(
    small: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = DemoGrid(methods=("random",), budgets=(32,), limit=7, prompts=1)
    run_demo(tmp_path, threads=1, grid=grid, model=small)
    out = capsys.readouterr().out
    assert "blind" in out
    assert "seed 0" in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert "equal to the bit" in out


def test_threads_are_set_and_put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(demo, "_run", lambda *_: seen.append(torch.get_num_threads()))
    run_demo(tmp_path, threads=before + 1, model=(None, None))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_a_demo_of_keep_all_alone_runs(small: tuple[Any, Any], tmp_path: Path) -> None:
    rows = run_demo(tmp_path, threads=1, grid=DemoGrid((), (), limit=1, prompts=1), model=small)
    assert [row["method"] for row in rows] == ["keep_all"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_embedded", lambda: pytest.fail("loaded the model first"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Cannot write into"):
        run_demo(tmp_path / "file")


# The study behind it --------------------------------------------------------------------------


def test_the_records_are_a_study_that_goes_on_and_can_be_reported(
    small: tuple[Any, Any], written: Path, rows: list[dict[str, Any]]
) -> None:
    folder = ResultsFolder(written / "study")
    assert folder.study["name"] == "demo"
    cells = folder.cells()
    assert {"none", "keep_all"} <= {cell.label for cell in cells.values()}
    assert len(folder.records()) == 14 * len(cells) == 14 * (len(rows) + 1)
    before = list(folder.lines())
    again = run_demo(written, threads=1, grid=GRID, model=small)
    assert again == rows  # times too: nothing was asked or timed again
    assert list(folder.lines()) == before
    page = write_report(written / "study")["page"]
    assert "fastv" in page.read_text(encoding="utf-8")


def test_rows_are_counted_from_the_records(written: Path, rows: list[dict[str, Any]]) -> None:
    folder = ResultsFolder(written / "study")
    cells = {cell.label: cell.id for cell in folder.cells().values()}
    for row in rows[1:]:
        records = folder.records(cells[f"{row['method']} {row['num_keep']}"])
        assert row["accuracy"] == pytest.approx(sum(r.score or 0 for r in records) / 14)
        parts = [sum(v for k, v in (r.macs or {}).items() if k != "decode") for r in records]
        assert row["gflops"] == pytest.approx(2 * sum(parts) / 14 / 1e9)
        assert row["tokens_mean"] == pytest.approx(sum(r.tokens or 0 for r in records) / 14)


def test_the_sheet_shows_the_most_typical_question() -> None:
    good = np.array([True, False, True, True, True])  # 80 %
    poor = np.array([True, False, False, False, True])  # 40 %
    every = np.ones(5, bool)
    assert most_typical([good, poor], every) == 2  # good right, poor wrong
    assert most_typical([good, poor], np.arange(5) < 2) == 0
    assert most_typical([good, poor], ~every) == 0


# Kept patches --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "fastv", "pyramiddrop", "todre", "visionzip", "pool"])
def test_a_trace_tells_what_was_kept(vlm: VLM, name: str) -> None:
    with torch.inference_mode(), prune(vlm.model, name, num_keep=36) as run:
        vlm.model(**inputs_of(vlm), logits_to_keep=1)
    kept = kept_of(run.trace)
    assert kept.grid(0) == (24, 24)
    assert len(kept.dest[kept.dest >= 0].unique()) == 36
    if name == "pool":
        assert torch.bincount(kept.dest).tolist() == [16] * 36
    elif name != "visionzip":
        assert torch.equal((kept.dest >= 0).nonzero()[:, 0], kept.index)


def _map(dest: list[int], index: list[int], side: int = 2) -> KeptMap:
    pos = torch.tensor([[0, h, w] for h in range(side) for w in range(side)])
    return KeptMap(pos, torch.tensor(dest), torch.tensor(index))


def test_kept_patches_stay_and_dropped_ones_lose_their_colour() -> None:
    red = Image.new("RGB", (16, 16), (200, 0, 0))
    painted = paint(red, _map([0, -1, -1, 1], [0, 3]), cell=8)
    assert painted.shape == (16, 16, 3)
    assert painted[4, 4].tolist() == painted[12, 12].tolist() == [200, 0, 0]
    gray = painted[4, 12].astype(int)
    assert gray.min() > 180
    assert gray.max() - gray.min() < 6


def test_a_pooled_cell_is_its_mean_colour() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 200
    painted = paint(Image.fromarray(pixels), _map([0, 0, 0, 0], [0]), cell=8)
    inner = painted[1:-1, 1:-1].reshape(-1, 3)
    assert len(np.unique(inner, axis=0)) == 1
    assert abs(int(inner[0, 0]) - 100) <= 2


def test_scattered_merges_are_framed_in_orange() -> None:
    painted = paint(Image.new("RGB", (16, 16), (0, 0, 90)), _map([0, 1, -1, 0], [0, 1]), cell=8)
    assert painted[0, 0].tolist() == [213, 94, 0]
    assert painted[12, 12].tolist() != [0, 0, 90]


def test_two_pictures_at_once_cannot_be_drawn(vlm: VLM) -> None:
    with torch.inference_mode(), prune(vlm.model, "random", num_keep=4) as run:
        with pytest.raises(ConfigError, match="exactly one picture; the last forward held 0"):
            kept_of(run.trace)
        vlm.model(**inputs_of(vlm, 2))
    with pytest.raises(ConfigError, match="exactly one picture; the last forward held 2"):
        kept_of(run.trace)
