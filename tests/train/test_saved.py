# SPDX-License-Identifier: Apache-2.0
"""A pruned model comes back from its folder with its method, and its library reads the folder."""

from __future__ import annotations

import json
import os
import resource
import signal
import warnings
from functools import partial
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
from visprune.backbones.vlm import embedded
from visprune.errors import ConfigError, UnsupportedModel
from visprune.eval.models.load import load_model
from visprune.machine import written
from visprune.train.start import train

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
    options: dict[str, Any] = {
        "agent": {"agent_num": 4},
        "contmix": {"kernel_size": 3, "small_kernel_size": 2},
        "hilo": {"alpha": 0.5},
        "neighborhood": {"kernel_size": (2, 3)},
    }[kind]
    with_attention(model, kind, blocks=[0, 3], **options)
    with_attention(model, "neighborhood", blocks=[1], dilation=2, rel_pos_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("kind", ["agent", "contmix", "hilo", "neighborhood"])
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


def strangers(folder: Path) -> dict[str, bytes]:
    """Files that others put into a folder, at the top and below."""
    found = {"notes.txt": b"my thesis", "my_pretrained_llava.bin": b"precious",
             "results/r.csv": b"1", ".gitattributes": b"* text", "visprune.txt": b"mine",
             "README.md": b"my words", "weights-old/model.safetensors": b"older"}  # fmt: skip
    for name, content in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_others_put_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = strangers(tmp_path)
    for model in (vit(), visprune.prune(vit(), "tome", r=1), vit()):
        visprune.save_pretrained(model, tmp_path)
        assert {name: files_of(tmp_path)[name] for name in want} == want
    assert set(files_of(tmp_path)) == {*want, "config.json", "model.safetensors"}  # no method now
    inside = tmp_path / "here"
    inside.mkdir()
    (inside / "keep.txt").write_text("x")
    monkeypatch.chdir(inside)
    visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), ".")
    _, run = visprune.load_pretrained(".")
    assert run is not None
    assert (inside / "keep.txt").read_text() == "x"


@pytest.mark.parametrize("moment", range(1, 26))
def test_a_kill_leaves_the_old_files_or_the_new(moment: int, tmp_path: Path) -> None:
    """Death before the first, second ... of all changes that saving makes to the disk."""
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    theirs = strangers(folder)
    old = {k: v for k, v in files_of(folder).items() if k not in theirs}

    def work(rank: int) -> None:
        steps = iter(range(1, 99))

        def dying(plain: Any) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                if next(steps) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args, **options)

            return run

        for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync"):
            setattr(os, name, dying(getattr(os, name)))
        visprune.save_pretrained(visprune.prune(vit(), "evit", keep_ratio=0.5), folder)

    (ended,) = small.in_children(work)
    now = files_of(folder)
    assert {name: now[name] for name in theirs} == theirs
    committed = (folder / written._READY).is_dir() or ended == 0
    if not committed and b"evit" not in now["visprune.json"]:
        assert {name: now[name] for name in old} == old
    model, run = visprune.load_pretrained(folder)
    assert run is not None
    assert run.method.name == ("evit" if committed or b"evit" in now["visprune.json"] else "tome")
    new = visprune.save_pretrained(visprune.prune(vit(), "evit", keep_ratio=0.5), tmp_path / "new")
    want = files_of(new) if run.method.name == "evit" else old
    now = files_of(folder)
    assert {name: now[name] for name in want} == want
    assert {name: now[name] for name in theirs} == theirs
    run.remove()
    visprune.save_pretrained(visprune.prune(model, "tome", r=3), folder)
    _, run = visprune.load_pretrained(folder)
    assert run is not None
    assert run.method.r == 3
    assert set(files_of(folder)) == {*old, *theirs}
    assert not list(folder.glob(".visprune*"))


def test_every_moment_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many changes as the kills above go through: the last of them comes after the last."""
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    count = 0
    for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync"):

        def counting(plain: Any, *args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return plain(*args, **options)

        monkeypatch.setattr(os, name, partial(counting, getattr(os, name)))
    visprune.save_pretrained(visprune.prune(vit(), "evit", keep_ratio=0.5), folder)
    assert 8 <= count < 25


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    before = files_of(folder)

    class Bad:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{")
            raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"No space left on device\. What was there is whole"):
        visprune.save_pretrained(visprune.prune(vit(), "tome", r=2), folder, processor=Bad())
    assert files_of(folder) == before
    with pytest.raises(ConfigError, match="No space left"):
        visprune.save_pretrained(
            visprune.prune(vit(), "tome", r=2), tmp_path / "x", processor=Bad()
        )
    assert not (tmp_path / "x").exists()


def test_another_that_is_writing_is_left_alone(tmp_path: Path) -> None:
    """Two processes save into one folder at once: each writes its own, the last one stands."""
    folder = tmp_path / "saved"
    inside: list[Path] = []

    class Slow:
        def save_pretrained(self, fresh: Path) -> None:
            inside.append(Path(fresh))
            (ended,) = small.in_children(
                lambda rank: visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), folder)
            )
            assert ended == 0
            assert Path(fresh).is_dir()

    visprune.save_pretrained(visprune.prune(vit(), "tome", r=2), folder, processor=Slow())
    _, run = visprune.load_pretrained(folder)
    assert run is not None
    assert run.method.r == 2
    assert not inside[0].exists()


def test_what_would_be_read_in_place_of_the_new_model_is_refused(tmp_path: Path) -> None:
    model = tiny.build("llava")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a adapter_config\.json.*read in place"):
        visprune.save_pretrained(model, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json' is a folder"):
        visprune.save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_behind_a_link_is_written_to(tmp_path: Path) -> None:
    real = visprune.save_pretrained(vit(), tmp_path / "real")
    (tmp_path / "saved").symlink_to(real)
    folder = visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "saved")
    assert folder.is_symlink()
    assert (real / "visprune.json").is_file()


def test_without_a_processor_it_is_said_what_is_missing(tmp_path: Path) -> None:
    run = visprune.prune(tiny.build("llava"), "todre", num_keep=5)
    with pytest.warns(UserWarning, match=r"holds no processor.*eval.*processor=\.\.\."):
        visprune.save_pretrained(run, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visprune.save_pretrained(visprune.prune(vit(), "tome", r=1), tmp_path / "vit")
        model, processor = embedded.load()
        run.remove()
        visprune.save_pretrained(model, tmp_path / "whole", processor=processor)
        visprune.save_pretrained(model, tmp_path / "whole")  # it is there
    found = load_model(str(tmp_path / "whole"))
    assert type(found).__name__ == "VLM"
    with pytest.raises(ConfigError, match=r"save_pretrained.*processor=processor"):
        load_model(str(tmp_path / "saved"))


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


def test_a_model_from_elsewhere_is_not_replaced_by_training(tmp_path: Path) -> None:
    theirs = tmp_path / "weights" / "model.safetensors"
    theirs.parent.mkdir()
    theirs.write_bytes(b"precious")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: vlm_lora\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="that no run of visprune train wrote"):
        train(recipe, tmp_path)
    assert theirs.read_bytes() == b"precious"
    (tmp_path / "log.jsonl").touch()  # of a run that ended here
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        train(recipe, tmp_path)
