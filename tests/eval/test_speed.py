# SPDX-License-Identifier: Apache-2.0
"""Latency by part: every part is there, adds up, and the model is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.eval.instant import Instant, instant_study, loader
from tests.eval.small import small_embedded
from visprune.errors import ConfigError
from visprune.eval.models import vlm as models_vlm
from visprune.eval.models.vit import TimmClassifier
from visprune.eval.models.vlm import VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.run.runner import run_study
from visprune.eval.speed.measure import measure_jobs, measure_study
from visprune.eval.study.grid import SpeedPlan, build_study
from visprune.eval.tasks.imagenet import ImageNet

PLAN = {"rounds": 2, "warmup": 1, "batches": [1, 2], "new_tokens": 3, "prompts": 2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, dict[str, dict[str, Any]]]:
    model, processor = small_embedded()
    vlm = VLM(model, processor, name="small", style="plain", template=models_vlm.PLAIN)
    study = build_study(
        {
            "models": "small", "tasks": "embedded", "limit": 3, "speed": PLAN,
            "methods": ["todre", "fastv", "pyramiddrop"], "budgets": [16],
            "controls": ["none", "keep_all", "no_image"],
        }
    )  # fmt: skip
    out = tmp_path_factory.mktemp("speed")
    folder = run_study(study, out, loader=lambda spec: vlm)
    measure_study(study, folder, loader=lambda spec: vlm)
    labels = {cell.id: cell.label for cell in folder.cells().values()}
    return vlm, {labels[name]: values for name, values in ResultsFolder(out).speed().items()}


def test_every_part_is_measured_at_every_batch(
    measured: tuple[VLM, dict[str, dict[str, Any]]],
) -> None:
    _, speed = measured
    assert set(speed) == {
        "none", "keep_all", "todre 16", "fastv 16", "pyramiddrop 16", "no_image",
    }  # fmt: skip
    for label, values in speed.items():
        assert list(values["batch"]) == ["1", "2"]
        for parts in values["batch"].values():
            assert set(parts) == {
                "total_ms", "prefill_ms", "decode_ms_per_token", "vision_ms", "selection_ms",
            }  # fmt: skip
            for part in parts.values():
                assert 0.0 <= part["q1"] <= part["median"] <= part["q3"]
            middle = {name: part["median"] for name, part in parts.items()}
            assert middle["total_ms"] > middle["prefill_ms"] > 0
            assert middle["decode_ms_per_token"] > 0
            assert (middle["vision_ms"] > 0) == (label != "no_image")
            assert (middle["selection_ms"] > 0) == (label not in ("none", "no_image"))


def test_what_it_ran_on_is_said(measured: tuple[VLM, dict[str, dict[str, Any]]]) -> None:
    _, speed = measured
    baseline = speed["none"]["cell"]
    for values in speed.values():
        assert values["baseline_cell"] == baseline
        assert (values["rounds"], values["attention"], values["device"]) == (2, "sdpa", "cpu")
        assert values["peak_bytes"] is None
        assert values["env"]


def test_cache_bytes_are_read_off_the_cache(
    measured: tuple[VLM, dict[str, dict[str, Any]]],
) -> None:
    vlm, speed = measured
    text = vlm.model.config.text_config
    token = 2 * 4 * text.num_key_value_heads * text.head_dim  # keys and values, fp32
    saved = speed["none"]["kv_bytes"] - speed["fastv 16"]["kv_bytes"]
    assert saved == token * (576 - 16) * (text.num_hidden_layers - 2)
    assert speed["keep_all"]["kv_bytes"] == speed["none"]["kv_bytes"]


def test_the_model_is_left_as_it_was(measured: tuple[VLM, dict[str, dict[str, Any]]]) -> None:
    vlm, _ = measured
    assert "get_image_features" not in vars(vlm.model.model)
    assert not any(module._forward_pre_hooks for module in vlm.model.modules())


def test_a_second_call_measures_nothing_again(
    measured: tuple[VLM, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    vlm, _ = measured
    study = build_study(
        {
            "models": "small", "tasks": "embedded", "limit": 1, "controls": ["none"],
            "speed": {**PLAN, "rounds": 1, "batches": [1]},
        }
    )  # fmt: skip
    folder = run_study(study, tmp_path, loader=lambda spec: vlm)
    measure_study(study, folder, loader=lambda spec: vlm)
    before = folder.speed()
    measure_study(study, folder, loader=lambda spec: vlm)
    assert folder.speed() == before


def test_a_classifier_is_one_forward(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), {"a": "red", "b": "blue"}[name]).save(
            tmp_path / "val" / name / "x.png"
        )
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=2, depth=2, embed_dim=24, num_heads=2, img_size=64
    )
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    classifier = TimmClassifier(model, name="vit")
    study = build_study(
        {
            "models": "vit", "tasks": [ImageNet(data=str(tmp_path))], "methods": ["tome"],
            "budgets": [{"r": 2}], "controls": ["none"],
        }
    )  # fmt: skip
    from visprune.eval.run.jobs import jobs_of

    jobs = [job for job in jobs_of(study, classifier) if not job.cell.refused]
    found = measure_jobs(classifier, jobs, SpeedPlan(rounds=2, batches=(1, 2)))
    assert len(found) == 2
    for values in found.values():
        assert set(values["batch"]["2"]) == {"total_ms", "vision_ms"}
        assert values["kv_bytes"] is None


def test_what_cannot_be_timed_is_refused(tmp_path: Path) -> None:
    study = instant_study(limit=2, speed=True)
    folder = run_study(study, tmp_path, loader=loader(Instant()))
    with pytest.raises(ConfigError, match="no model that can be timed"):
        measure_study(study, folder, loader=loader(Instant()))
