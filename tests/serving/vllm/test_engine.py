# SPDX-License-Identifier: Apache-2.0
"""Studies answered by an engine: the same records as from transformers, under keys of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import envs

from tests.serving.vllm.checkpoints import build
from visprune.errors import ConfigError
from visprune.eval.models import served as served_module
from visprune.eval.models.base import ModelEntry
from visprune.eval.models.load import load_model
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.run.runner import run_study
from visprune.eval.study.grid import Study, build_study
from visprune.eval.tasks.base import get_task
from visprune.methods.fastv import FastV
from visprune.methods.todre import ToDRE

OPTIONS = {"enforce_eager": True, "max_num_seqs": 16}
SERVED = {"name": "embedded", "engine": "vllm", "engine_options": OPTIONS}
# As a server counts positions of a line.
METHODS: list[dict[str, Any]] = [
    {"method": "todre", "stage2": False, "positions": "compact"},
    {"method": "divprune", "positions": "compact"},
    {"method": "random", "positions": "compact"},
]
QUESTIONS = 24


def study(*models: Any, **more: Any) -> Study:
    return build_study(
        {
            "models": list(models), "tasks": ["embedded"], "methods": METHODS, "budgets": [64],
            "controls": ["none", "no_image"], "limit": QUESTIONS, "pictures": False, **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    model: Any = load_model(ModelEntry(**SERVED))
    with pytest.MonkeyPatch.context() as patch:  # as the engines of conftest.py
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield model
        model.close()
    envs.disable_envs_cache()


def test_answers_of_both_engines_are_equal_and_lie_side_by_side(
    served: Any, tmp_path: Path
) -> None:
    """One folder, one study of both: text, tokens and score of each question; asked once."""
    both = study("embedded", SERVED, batch_size=16)

    def loader(entry: ModelEntry) -> Any:
        return served if entry.engine == "vllm" else load_model(entry)

    folder = run_study(both, tmp_path, loader=loader)
    cells = folder.cells()
    found: dict[str, dict[tuple[str, str], Any]] = {"transformers": {}, "vllm": {}}
    for record in folder.records():
        assert record.error is None, record.error
        cell = cells[record.cell]
        engine = cell.model.get("engine", "transformers")
        found[engine][cell.label, record.sample] = (
            record.text, record.answer, record.score, record.tokens, record.new_tokens,
        )  # fmt: skip
    assert len(found["vllm"]) == QUESTIONS * (len(METHODS) + 2)
    assert found["vllm"] == found["transformers"]
    assert len({answer[0] for answer in found["vllm"].values()}) > 5, "answers tell questions apart"
    assert {answer[3] for answer in found["vllm"].values()} == {0.0, 64.0, 576.0}
    assert {cell.model["name"] for cell in cells.values()} == {"embedded", "embedded (vLLM)"}

    count = len(folder.records())
    again = run_study(both, tmp_path, loader=loader)
    assert len(again.records()) == count


def test_what_does_not_fit_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    """With the reason, the methods that fit, and the parameter that would make it fit."""
    model: Any = load_model(ModelEntry(**SERVED))
    task = get_task("embedded")
    said = model.refusal(FastV(num_keep=64), task)
    assert "inside the decoder" in said
    assert "divprune" in said
    assert "With todre,stage2=false it can." in model.refusal(ToDRE(num_keep=64), task)
    assert model.refusal(ToDRE(num_keep=64, stage2=False), task) is None
    spread = ToDRE(num_keep=64, stage2=False, positions="original")
    assert "positions" in model.refusal(spread, task)
    with pytest.raises(ConfigError, match="inside the decoder"):
        run_study(study(SERVED, methods=["fastv"], controls=False), tmp_path)
    assert model._engine is None


def test_options_that_an_engine_does_not_take(tmp_path: Path) -> None:
    sampled = study(SERVED, generation={"do_sample": True})
    with pytest.raises(ConfigError, match="greedy"):
        run_study(sampled, tmp_path / "a")
    with pytest.raises(ConfigError, match="top_k"):
        run_study(study(SERVED, generation={"top_k": 4}), tmp_path / "b")
    for more, said in (({"attention": "eager"}, "attention"), ({"device": "cpu"}, "device")):
        with pytest.raises(ConfigError, match=said):
            load_model(ModelEntry(**{**SERVED, **more}))
    with pytest.raises(ConfigError, match="dtype"):
        load_model(ModelEntry("embedded", engine="vllm", engine_options={"dtype": "float16"}))


def test_an_engine_that_does_not_start_ends_the_study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is no error of a question: nothing is recorded, and nothing asked again."""
    starts: list[Any] = []

    def broken(*args: Any, **options: Any) -> Any:
        starts.append(args)
        raise ConfigError("vLLM does not start with this model: too little memory")

    monkeypatch.setattr(served_module, "Engine", broken)
    with pytest.raises(ConfigError, match="too little memory"):
        run_study(study(SERVED), tmp_path)
    assert len(starts) == 1
    assert ResultsFolder(tmp_path).records() == []


def test_without_the_plug_in_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(ConfigError, match="VLLM_PLUGINS"):
        load_model(ModelEntry(**SERVED))


def test_identity_follows_the_weights_the_engine_and_its_options(tmp_path: Path) -> None:
    folder = build("qwen2_5_vl", tmp_path / "qwen")
    one = load_model(ModelEntry(str(folder), engine="vllm")).describe()
    assert one["dtype"] == "float32", "as saved, not as vLLM would have it"
    assert "positions" not in one, "(t, h, w) stay"
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    two = load_model(ModelEntry(str(folder), engine="vllm")).describe()
    assert {k for k in one if one[k] != two[k]} == {"weights"}
    longer = load_model(ModelEntry(str(folder), engine="vllm", engine_options={"seed": 1}))
    assert longer.describe()["engine_options"] == {"seed": 1}
    plain = load_model(ModelEntry(str(folder), device="cpu")).describe()
    assert plain["name"] != one["name"]
    assert "engine" not in plain
