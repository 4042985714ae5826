# SPDX-License-Identifier: Apache-2.0
"""A pruned model comes back from its folder with its method, and its library reads the folder."""

from __future__ import annotations

import json
import os
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
from tests.train import small
from visprune.backbones.vit import with_attention
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine import saved

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


def replaced(kind: str) -> torch.nn.Module:
    """A ViT with attention replaced in two ways, and weights that are not the first ones."""
    model = vit()
    options = {"hilo": {"alpha": 0.5}, "neighborhood": {"kernel_size": (2, 3)}}[kind]
    with_attention(model, kind, blocks=[0, 3], **options)
    with_attention(model, "neighborhood", blocks=[1], dilation=2, rel_pos_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("kind", ["hilo", "neighborhood"])
def test_replaced_attention_comes_back(kind: str, tmp_path: Path) -> None:
    model, pixels = replaced(kind), torch.randn(2, 3, 32, 32)
    folder = visprune.save_pretrained(model, tmp_path / "saved")
    again, run = visprune.load_pretrained(folder)
    assert run is None
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(pixels), model(pixels))
    assert [type(b.attn) for b in again.blocks] == [type(b.attn) for b in model.blocks]
    other, _ = visprune.load_pretrained(folder, num_classes=3)  # a new head, as by timm
    assert other(pixels).shape == (2, 3)
    twice = visprune.save_pretrained(again, tmp_path / "twice")
    assert (twice / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    # A folder of an earlier version does not say what was replaced, and loads as it did.
    config = json.loads((folder / "config.json").read_text())
    del config["with_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(
        (visprune.save_pretrained(vit(), tmp_path / "plain") / "model.safetensors").read_bytes()
    )
    assert type(visprune.load_pretrained(folder)[0].blocks[0].attn).__name__ == "Attention"


def test_replaced_attention_that_does_not_fit_says_why(tmp_path: Path) -> None:
    folder = visprune.save_pretrained(replaced("hilo"), tmp_path / "saved")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["with_attention"][0]["blocks"] = [0]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"Cannot load the model.*blocks\.3\.attn"):
        visprune.load_pretrained(folder)
    config["with_attention"][0]["kind"] = "hillo"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"Did you mean 'hilo'"):
        visprune.load_pretrained(folder)
    path.write_text("[")
    with pytest.raises(ConfigError, match="damaged"):
        visprune.load_pretrained(folder)


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_while_a_folder_is_replaced_leaves_one(
    in_one_step: bool, moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    steps = iter(range(1, 99))

    def dying(plain: Any) -> Any:
        """The same, or death before it: one of the changes that saving makes at the end."""

        def run(*args: Any, **options: Any) -> Any:
            if next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **options)

        return run

    def work(rank: int) -> None:
        if not in_one_step:
            monkeypatch.setattr(saved, "_exchange", lambda one, other: False, raising=False)
        monkeypatch.setattr(os, "replace", dying(os.replace))
        monkeypatch.setattr(saved.shutil, "rmtree", dying(saved.shutil.rmtree))
        visprune.save_pretrained(visprune.prune(vit(), "tome", r=2), folder)

    (ended,) = small.in_children(work)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one_step = in_one_step and saved._exchange(tmp_path / "a", tmp_path / "b")
    assert folder.is_dir() == (one_step or moment != 2)
    assert ended == (0 if one_step and moment > 1 else -signal.SIGKILL)
    _, run = visprune.load_pretrained(folder)
    assert run is not None
    assert run.method.r == (1 if moment == 1 and not one_step else 2)
    visprune.save_pretrained(visprune.prune(vit(), "tome", r=3), folder)
    _, run = visprune.load_pretrained(folder)
    assert run is not None
    assert run.method.r == 3


def test_the_next_saving_finishes_what_was_killed(tmp_path: Path) -> None:
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    fresh = visprune.save_pretrained(visprune.prune(vit(), "tome", r=2), tmp_path / "fresh")
    folder.rename(tmp_path / ".saved-abcdefgh-old")
    fresh.rename(tmp_path / ".saved-abcdefgh")
    visprune.save_pretrained(visprune.prune(vit(), "tome", r=3), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_link_is_replaced_like_a_folder(tmp_path: Path) -> None:
    real = visprune.save_pretrained(vit(), tmp_path / "real")
    (tmp_path / "saved").symlink_to(real)
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    assert not folder.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "saved"]
    assert not (real / "visprune.json").exists()


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
