# SPDX-License-Identifier: Apache-2.0
"""The plan that `--dry-run` prints, and the figures of a table in a narrow terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from tests.eval.instant import Instant, instant_study, loader
from visprune.errors import ConfigError
from visprune.eval.evaluate import print_rows
from visprune.eval.run.dry_run import Planned, plan_study, print_plan
from visprune.eval.study.grid import build_study

LONG = "runs/2026-11-26/vlm_easy_vqa_with_all_its_weights/checkpoint-last"


def printed(planned: list[Planned], width: int = 80, **options: Any) -> list[str]:
    out = io.StringIO()
    print_plan(Console(file=out, width=width), planned, **options)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_long_names_do_not_break_the_rows_of_a_plan() -> None:
    task = "folder (path=data/somewhere/far/away/in/a/deep/folder/test, metric_name=exact_match)"
    planned = [
        Planned(LONG, task, seed, label, 100, 10 * (seed == 1), 50.0)
        for seed in (1, 2, 3)
        for label in ("none", "keep_all", "visionzip 128", "no_image")
    ]
    lines = printed(planned)
    assert lines[:3] == [LONG, f"  {task}", "  seed 1, 2, 3"]
    rows = [line.split() for line in lines if line.endswith("2 min")]
    assert [row[:-2] for row in rows] == [
        ["none", "300", "10"], ["keep_all", "300", "10"], ["visionzip", "128", "300", "10"],
        ["no_image", "300", "10"],
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in lines if line not in (LONG, f"  {task}"))
    assert "12 cells, 1160 samples to ask, about 10 min" in " ".join(lines)


def test_a_refusal_is_said_once_and_what_is_not_there_has_no_estimate() -> None:
    planned = [
        *(Planned("a", "t", seed, "visionzip 8", 5, 0, 0.0, "No class token.") for seed in (0, 1)),
        Planned("a", "t", 0, "none", 5, 0, 30.0),
        Planned("b", "t", 0, "none", 5),
    ]
    text = "\n".join(printed(planned, processes=2))
    assert text.count("visionzip 8: No class token.") == 1
    assert text.count("cannot run") == 1
    assert "10 samples to ask, about 15 s in 2 process(es)" in text.replace("\n", " ")
    assert "no estimate for b: not on this machine" in text.replace("\n", " ")


def test_a_dry_run_asks_no_network(tmp_path: Path) -> None:
    """In a process that is online: a model, a timm model and a benchmark that are not here."""
    asked = tmp_path / "asked"
    program = f"""
import pathlib, socket
def refuse(*args, **options):
    with open({str(asked)!r}, "a") as file:
        file.write(f"{{args[:2]}}\\n")
    raise socket.gaierror("no network")
socket.getaddrinfo = refuse
import huggingface_hub, datasets
from visprune.eval.evaluate import run_command
run_command(
    None, None,
    {{"models": ["embedded", "somebody/elsewhere", "timm:vit_tiny_patch16_224"],
      "tasks": ["gqa", {{"task": "embedded", "limit": 2}}], "controls": ["none"]}},
    dry_run=True, retry_errors=False, threads=None, answers=None,
)
assert not huggingface_hub.constants.HF_HUB_OFFLINE
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False,
        env={**environment, "HF_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not asked.exists(), asked.read_text()[:500]
    assert "not counting gqa: data not on this machine" in " ".join(done.stdout.split())


def test_two_tasks_of_one_name_are_told_apart_by_what_was_set() -> None:
    study = build_study({
        "models": ["somebody/elsewhere"], "methods": ["todre"], "budgets": [8], "controls": False,
        "tasks": [{"task": "embedded", "limit": 2}, {"task": "embedded", "per_kind": 3}],
    })  # fmt: skip
    planned = plan_study(study)
    assert [row.task for row in planned] == ["embedded (limit=2)", "embedded (per_kind=3)"]


def test_a_study_is_listed_where_its_data_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a published study would run is no secret of the machine that holds its data."""

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("OfflineModeIsEnabled")

    monkeypatch.setattr(datasets, "load_dataset", away)
    study = build_study({
        "models": ["embedded"], "methods": ["todre"], "budgets": [8], "controls": ["none"],
        "tasks": ["gqa", {"task": "embedded", "limit": 2}],
    })  # fmt: skip
    planned = plan_study(study)
    assert [(row.task, row.label, row.samples) for row in planned] == [
        ("gqa", "none", None), ("gqa", "todre 8", None),
        ("embedded (limit=2)", "none", 2), ("embedded (limit=2)", "todre 8", 2),
    ]  # fmt: skip
    lines = printed(planned)
    assert ["todre", "8", "?", "0", "?"] in [line.split() for line in lines]
    text = " ".join(lines)
    assert "4 cells, 4 samples to ask, about" in text
    assert "not counting gqa: data not on this machine. Nothing was run." in text


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("embeded", "Did you mean 'embedded'"),
        ("tim:vit_tiny", "Did you mean 'timm'"),
        ("timm:vit_tiny_patch16_225", "Did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224.augreg_in21", "Did you mean 'augreg_in21k'"),
        ("open_clip:ViT-B-33/openai", "Did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/opnai", "Did you mean 'openai'"),
        ("open_clip:ViT-B-32", "names no weights"),
        ("./runs/nowhere/weights", "cannot load"),
    ],
)
def test_a_name_that_no_machine_knows_is_an_error_and_no_missing_estimate(
    name: str, match: str
) -> None:
    study = build_study({
        "models": [name], "tasks": [{"task": "embedded", "limit": 2}], "controls": ["none"],
    })  # fmt: skip
    with pytest.raises(ConfigError, match=match):
        plan_study(study)


def test_models_that_other_machines_may_have_are_listed() -> None:
    names = ["somebody/elsewhere", "timm:vit_tiny_patch16_224", "open_clip:ViT-B-32/openai"]
    study = build_study({
        "models": names, "tasks": [{"task": "embedded", "limit": 2}], "controls": ["none"],
    })  # fmt: skip
    assert [(row.model, row.samples, row.seconds) for row in plan_study(study)] == [
        (name, 2, None) for name in names
    ]


def test_a_cell_is_planned_once_and_notes_and_reasons_are_said_once() -> None:
    chance = {"method": "random", "label": "chance"}
    study = instant_study(methods=[chance], budgets=[4], controls=["random"], limit=3)
    assert [v.label for v in study.variants] == ["random 4", "chance 4"]
    planned = plan_study(study, loader=loader(Instant()))
    assert [(row.label, row.samples) for row in planned] == [("random 4", 3)]
    planned = [Planned("a", "t", 0, label, 5, 0, 0.0, "No class.") for label in ("x", "y")]
    lines = printed(planned, notes=["left out: pool: no."])
    assert "x, y: No class." in lines
    assert "left out: pool: no." in lines


@pytest.mark.parametrize("floors", [{}, {"commonest answer": 25.0, "text-only prior": 31.25}])
def test_floors_stand_below_the_printed_scores(floors: dict[str, float]) -> None:
    row = {"model": "m", "task": "t", "label": "todre 8", "score": 50.0, "low": 40.0, "high": 60.0,
           "delta": None, "delta_low": None, "delta_high": None, "tokens": 8.0, "gflops": 1.0,
           "kv_bytes": 1, "errors": 0, "floors": floors}  # fmt: skip
    out = io.StringIO()
    print_rows(Console(file=out, width=80), [row])
    said = "Without the picture: commonest answer 25.0; text-only prior 31.2." in out.getvalue()
    assert said == bool(floors)
