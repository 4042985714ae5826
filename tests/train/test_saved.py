# SPDX-License-Identifier: Apache-2.0
"""A pruned model comes back from its folder with its method, and its library reads the folder."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

import visprune
from tests import tiny
from tests.contract.cases import batch
from visprune.errors import ConfigError, UnsupportedModel

METHODS: dict[str, dict[str, Any]] = {
    "tome": {"r": [2, 2, 1, 0]},
    "evit": {"keep_ratio": 0.5, "fuse": False},
    "dynamicvit": {"keep_ratio": 0.6},
}


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **args).eval()


@pytest.mark.parametrize("name", METHODS)
def test_a_pruned_vit_comes_back(name: str, tmp_path: Path) -> None:
    model, pixels = vit(), torch.randn(2, 3, 32, 32)
    run = visprune.prune(model, name, **METHODS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        want = model(pixels)
    folder = visprune.save_pretrained(run, tmp_path / "saved")
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        assert torch.equal(model(pixels), want)  # saving changed nothing
    again, back = visprune.load_pretrained(folder)
    assert back is not None
    assert back.method == run.method
    with torch.no_grad():
        assert torch.equal(again(pixels), want)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    run.remove()
    with torch.no_grad():
        assert torch.equal(plain(pixels), model(pixels))
        assert not torch.equal(plain(pixels), want)


def test_a_pruned_vlm_comes_back(tmp_path: Path) -> None:
    model, inputs = tiny.build("llava"), batch("llava")
    with visprune.prune(model, "todre", num_keep=5) as run, torch.no_grad():
        want = model(**inputs).logits.nan_to_num()
        visprune.save_pretrained(run, tmp_path / "saved")
    again, back = visprune.load_pretrained(tmp_path / "saved")
    assert back is not None
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits.nan_to_num(), want)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_an_adapter_comes_back_on_its_base(tmp_path: Path) -> None:
    inputs = batch("llava")
    visprune.save_pretrained(tiny.build("llava"), tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(base, config).eval()
    run = visprune.prune(wrapped, "fastv", num_keep=5)
    with torch.no_grad():
        want = wrapped(**inputs).logits.nan_to_num()
    visprune.save_pretrained(run, tmp_path / "saved", model=wrapped)
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again, _ = visprune.load_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits.nan_to_num(), want)


def test_without_a_method_there_is_no_run(tmp_path: Path) -> None:
    visprune.save_pretrained(vit(), tmp_path / "saved")
    model, run = visprune.load_pretrained(tmp_path / "saved")
    assert run is None
    assert not model.training


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(ConfigError, match="Cannot write"):
            visprune.save_pretrained(visprune.prune(vit(), "tome", r=2), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor"):
        visprune.load_pretrained(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        visprune.load_pretrained(tmp_path)
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    (folder / "visprune.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        visprune.load_pretrained(folder)
    (folder / "visprune.json").write_text(json.dumps({"method": {"method": "tomme", "r": 1}}))
    with pytest.raises(ConfigError, match="Did you mean 'tome'"):
        visprune.load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="Cannot load the model"):
        visprune.load_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="neither saved by transformers nor by timm"):
        visprune.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "linear")
    assert not (tmp_path / "linear").exists()
