# SPDX-License-Identifier: Apache-2.0
"""Image classification: it learns, and nothing but recipe and step decides what a step does."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.train import small
from visprune.errors import ConfigError
from visprune.train import checkpoint, start
from visprune.train.image import loop
from visprune.train.image.progress import Progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_folder(tmp_path_factory.mktemp("data") / "photos")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_the_weights_are_an_ordinary_timm_model(folder: Path, tmp_path: Path) -> None:
    raw = small.recipe(folder, schedule__epochs=12, augment={}, log_every=4, validate_every=6)
    result = small.run(raw, tmp_path)
    rows = [row for row in small.log(tmp_path) if row["event"] == "train"]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert {"epoch", "lr", "accuracy", "images_per_s", "seconds_left"} <= rows[-1].keys()
    assert rows[-1]["seconds_left"] == 0
    assert result["validation"]["model"]["accuracy"] >= 0.8
    assert result["validation"]["model"]["pictures"] == 18
    assert json.loads((tmp_path / "result.json").read_text())["validation"] == result["validation"]
    model = timm.create_model(f"local-dir:{tmp_path / 'weights'}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, small.SIDE, small.SIDE)
    transform = timm.data.create_transform(**config)
    right = sum(
        int(model(transform(small.picture(label, 1000 + i))[None]).argmax()) == label
        for label in range(3)
        for i in range(6)
    )
    assert right / 18 == result["validation"]["model"]["accuracy"]


# A kill at any step --------------------------------------------------------------------------

RICH: dict[str, Any] = {
    "schedule__epochs": 2,
    "ema": {"decay": 0.9},
    "optimizer__name": "nmuon",
    "micro_batch": 4,
}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    small.run(small.recipe(folder, **RICH), out)
    return out


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(number: int, plain: Callable[..., Any]) -> Callable[..., Any]:
    """``plain``, but the process dies on entering call ``number`` (from 0)."""
    left = [number]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            die()
        left[0] -= 1
        return plain(*args, **kwargs)

    return wrapped


KILLS: dict[str, tuple[Any, str, int]] = {
    "before the first step": (loop._Run, "_one_step", 0),
    "after a step that was saved": (loop._Run, "_one_step", 2),
    "after a step that was not saved": (loop._Run, "_one_step", 5),
    "in the second epoch": (loop._Run, "_one_step", 9),
    "between two micro-batches": (torch.nn.Module, "requires_grad_", 10**9),  # replaced below
    "while validating": (loop._Run, "_validate", 0),
    "with the checkpoint half written": (checkpoint.os, "replace", 1),
    "after the last checkpoint": (loop._Run, "_finish", 0),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_resumes_to_the_same_weights(
    moment: str, folder: Path, whole: Path, tmp_path: Path
) -> None:
    where, name, number = KILLS[moment]
    if moment == "between two micro-batches":
        where, name, number = torch.Tensor, "backward", 7

    def work(rank: int) -> None:
        setattr(where, name, before_call(number, getattr(where, name)))
        small.run(small.recipe(folder, **RICH), tmp_path)

    assert small.in_children(work) == [-signal.SIGKILL]
    assert not (tmp_path / "result.json").exists()
    small.run(small.recipe(folder, **RICH), tmp_path, resume=True)
    assert equal(small.weights(tmp_path), small.weights(whole))
    clock = ("images_per_s", "seconds_left")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in clock} for row in small.log(out)]
        for out in (tmp_path, whole)
    )
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if a["event"] == "train" and a["step"] > 1:  # after a resume a line may cover fewer steps
            assert a == b


def test_a_full_disk_leaves_the_old_checkpoint(folder: Path, tmp_path: Path) -> None:
    small.run(small.recipe(folder, schedule__epochs=0.5), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    old = path.read_bytes()
    # The kernel refuses to let a file grow, as a full disk would.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(
            ConfigError, match=r"Cannot write the checkpoint.*one before it is whole"
        ):
            small.run(small.recipe(folder, schedule__epochs=1), tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.glob("*.partial")] == []
    small.run(small.recipe(folder, schedule__epochs=1), tmp_path, resume=True)


# Many processes ------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_two(raw: dict[str, Any], out: Path) -> None:
    port = free_port()

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        result = small.run(raw, out)
        assert result["processes"] == 2
        torch.distributed.destroy_process_group()

    assert small.in_children(work, count=2) == [0, 0]


def test_two_processes_equal_one_to_the_bit(folder: Path, tmp_path: Path) -> None:
    """With drop path, mixing and a moving average: random numbers belong to the micro-batch."""
    raw = small.recipe(folder, **RICH)
    small.run(raw, tmp_path / "one")
    run_two(raw, tmp_path / "two")
    assert equal(small.weights(tmp_path / "one"), small.weights(tmp_path / "two"))
    one, two = (small.log(tmp_path / name)[-1] for name in ("one", "two"))
    assert one["model"]["accuracy"] == two["model"]["accuracy"]
    assert one["model"]["pictures"] == two["model"]["pictures"] == 18
    assert one["ema"]["loss"] == pytest.approx(two["ema"]["loss"], rel=1e-6)


def test_two_processes_equal_one_without_micro_batches(folder: Path, tmp_path: Path) -> None:
    """Mixing pairs pictures of one micro-batch, whatever its size: only rounding differs."""
    raw = small.recipe(folder, model__args__drop_path_rate=0.0)
    small.run(raw, tmp_path / "one")
    run_two(raw, tmp_path / "two")
    one, two = small.weights(tmp_path / "one"), small.weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=0, msg=name)


# What a step depends on ----------------------------------------------------------------------


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    small.run(small.recipe(folder), tmp_path / "none")
    small.run(small.recipe(folder, data__workers=2), tmp_path / "two")
    assert equal(small.weights(tmp_path / "none"), small.weights(tmp_path / "two"))


def test_gradient_checkpointing_changes_nothing(folder: Path, tmp_path: Path) -> None:
    small.run(small.recipe(folder, model__args__drop_path_rate=0.0), tmp_path / "plain")
    raw = small.recipe(folder, model__args__drop_path_rate=0.0, model__grad_checkpointing=True)
    small.run(raw, tmp_path / "again")
    assert equal(small.weights(tmp_path / "plain"), small.weights(tmp_path / "again"))


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(folder: Path, tmp_path: Path) -> None:
    seen = []

    def note(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear) and module.training:
            seen.append(out.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        small.run(small.recipe(folder, precision="bf16", schedule__epochs=0.2), tmp_path)
    finally:
        handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert {t.dtype for t in small.weights(tmp_path).values()} == {torch.float32}


def test_the_moving_average_is_what_is_saved(folder: Path, tmp_path: Path) -> None:
    decay = 0.5
    raw = small.recipe(
        folder, ema={"decay": decay, "warmup": False}, save_every=1, schedule__epochs=0.5
    )
    seen = []
    plain = loop._Run._save

    def remember(self: Any) -> None:
        seen.append({k: v.clone() for k, v in self.student.model.state_dict().items()})
        plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_save", remember)
        small.run(raw, tmp_path)
    want = seen[0]
    for state in seen[1:]:
        want = {k: decay * want[k] + (1 - decay) * state[k] for k in want}
    for name, value in small.weights(tmp_path).items():
        torch.testing.assert_close(value, want[name], atol=1e-6, rtol=1e-5)


# Bad input -----------------------------------------------------------------------------------


def test_a_device_that_is_not_here_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no CUDA GPU here"):
        small.run(small.recipe(folder, device="cuda"), tmp_path)


def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x09broken")
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        small.run(small.recipe(folder), tmp_path, resume=True)


def test_a_run_folder_is_no_teacher_but_its_weights_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "weights").mkdir(parents=True)
    raw = small.recipe(folder, distill={"teacher": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"Did you mean '.*run/weights'"):
        small.run(raw, tmp_path / "out")


def test_no_readable_picture_to_validate_on(folder: Path, tmp_path: Path) -> None:
    """The state is written before the refusal: with pictures mended, the run resumes."""
    root = shutil.copytree(folder, tmp_path / "photos")
    kept = {path: path.read_bytes() for path in (root / "val").rglob("*.png")}
    for path in kept:
        path.write_bytes(b"broken")
    raw = small.recipe(root, data__on_corrupt="skip", save_every=100)
    with pytest.raises(ConfigError, match=r"Not one validation picture of .*val can be read"):
        small.run(raw, tmp_path / "out")
    for path, data in kept.items():
        path.write_bytes(data)
    result = small.run(raw, tmp_path / "out", resume=True)
    assert result["resumed_at"] == result["steps"]
    assert result["validation"]["model"]["pictures"] == 18


def test_a_worker_names_a_corrupt_picture_in_one_line(folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "photos")
    (root / "train" / "red" / "003.png").write_bytes(b"broken")
    with pytest.raises(ConfigError) as caught:
        small.run(small.recipe(root, data__workers=1), tmp_path / "out")
    assert "Traceback" not in str(caught.value)
    assert "red/003.png: it is no picture" in str(caught.value)


@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_corrupt_pictures_are_named(policy: str, tmp_path: Path) -> None:
    root = small.make_folder(tmp_path / "photos", train=4, val=2)
    for name in ("train/green/002.png", "val/red/001.png"):
        (root / name).write_bytes(b"broken")
    raw = small.recipe(root, batch=4, data__on_corrupt=policy, schedule__epochs=3)
    if policy == "refuse":
        with pytest.raises(ConfigError, match=r"green/002\.png.*on_corrupt=skip"):
            small.run(raw, tmp_path / "out")
        return
    result = small.run(raw, tmp_path / "out")
    named = " ".join(result["skipped_pictures"])
    assert len(result["skipped_pictures"]) == 2
    assert "green/002.png" in named
    assert "red/001.png" in named
    assert result["validation"]["model"]["pictures"] == 5
    events = [row["picture"] for row in small.log(tmp_path / "out") if row["event"] == "skipped"]
    assert sorted(events) == result["skipped_pictures"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__nam": "x"}, "unknown key 'nam'. Did you mean 'name'"),
        ({"model__name": "vit_tinny_patch16_224"}, "Did you mean 'vit_tiny_patch16_224'"),
        ({"model__args": {"patchsize": 4}}, "model.args do not fit"),
        ({"optimizer__name": "adamv"}, "optimizer.name is 'adamv'. Did you mean 'adam"),
        ({"optimizer__args": {"bettas": 1}}, "optimizer.args do not fit"),
        ({"optimizer__lr": "fast"}, "must be a number"),
        ({"schedule__name": "plateau"}, "schedule.name is 'plateau'"),
        ({"augment__transform": {"hflop": 1}}, "augment.transform"),
        ({"augment__smoothing": 2}, "allowed: 0 to 1"),
        ({"augment__transform": {"color_jitter": "a"}}, "augment.transform"),
        ({"augment__mixup": -1}, r"augment.mixup is -1.* 0 or above"),
        ({"optimizer__clip_grad": -1.0}, r"clip_grad is -1.0; it must be above 0"),
        ({"optimizer__clip_grad": 0}, "clip_grad is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": -1}, "threads is -1"),
        ({"data__workers": -1}, r"data.workers is -1"),
        ({"data__val_limit": 0}, r"data.val_limit is 0"),
        ({"device": "gpu"}, "device is 'gpu'; allowed: auto, cpu, cuda"),
        ({"model__pretrained": True, "model__name": "vit_tiny_patch16_224"}, "cannot be had"),
        ({"precision": "fp8"}, "Allowed: fp32, bf16"),
        ({"data__on_corrupt": "ignore"}, "Allowed: refuse, skip"),
        ({"batch": 64}, "has 48 pictures in use"),
        ({"batch": 7, "micro_batch": 2}, "must divide batch"),
        ({"batch": 9, "micro_batch": 3}, "even size"),
        ({"batch": True}, "batch is True"),
        ({"model__start_from": "nowhere"}, "to start from"),
        ({"distill": {"teacher": "nobody"}}, "neither a folder nor a name"),
        ({"distill": {"logit": 1}}, "teacher"),
    ],
)
def test_wrong_recipes_are_refused(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        small.run(small.recipe(folder, **changes), tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_classes_of_validation_must_be_known(tmp_path: Path) -> None:
    root = small.make_folder(tmp_path / "photos", train=4, val=2)
    shutil.copytree(root / "val" / "red", root / "val" / "rad")
    with pytest.raises(ConfigError, match=r"classes that .* has not: rad"):
        small.run(small.recipe(root), tmp_path / "out")


def test_validation_may_lack_classes(tmp_path: Path) -> None:
    root = small.make_folder(tmp_path / "photos", train=4, val=2)
    shutil.rmtree(root / "val" / "blue")
    small.run(small.recipe(root, batch=4), tmp_path / "out")
    data = loop.Student(loop.build_recipe(small.recipe(root), "x"), torch.device("cpu")).data
    assert sorted(set(data.val.pictures.labels)) == [1, 2]


def test_a_checkpoint_is_neither_overwritten_nor_mixed_up(folder: Path, tmp_path: Path) -> None:
    small.run(small.recipe(folder, schedule__epochs=0.2), tmp_path)
    with pytest.raises(ConfigError, match="already holds a checkpoint"):
        small.run(small.recipe(folder), tmp_path)
    with pytest.raises(ConfigError, match=r"other batch, optimizer\.lr"):
        small.run(small.recipe(folder, batch=4, optimizer__lr=1.0), tmp_path, resume=True)


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"another model: blocks\.0\.attn\.qkv\.weight \(3, 3\)"):
        small.run(small.recipe(folder, model__start_from=str(tmp_path)), tmp_path / "out")


def test_a_run_starts_from_weights_with_a_new_head(folder: Path, tmp_path: Path) -> None:
    small.run(small.recipe(folder, schedule__epochs=0.2), tmp_path / "a")
    raw = small.recipe(
        folder, model__start_from=str(tmp_path / "a" / "weights"), optimizer__lr=1e-9,
        schedule__epochs=0.2, schedule__warmup_epochs=0,
    )  # fmt: skip
    small.run(raw, tmp_path / "b")
    before = small.weights(tmp_path / "a")
    for name, value in small.weights(tmp_path / "b").items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
    root = small.make_folder(tmp_path / "photos", train=8, val=2)
    shutil.rmtree(root / "train" / "blue")
    shutil.rmtree(root / "val" / "blue")
    raw["data"]["path"] = str(root)
    small.run(raw, tmp_path / "c")
    after = small.weights(tmp_path / "c")
    assert len(after["head.weight"]) == 2
    torch.testing.assert_close(after["norm.weight"], before["norm.weight"], atol=1e-6, rtol=0)


def test_overrides_reach_every_section() -> None:
    raw = {"data": {"path": "x"}, "ema": None}
    got = start.with_overrides(raw, {"data.path": "y", "ema.decay": 0.9, "seed": 3})
    assert got == {"data": {"path": "y"}, "ema": {"decay": 0.9}, "seed": 3}
    assert raw == {"data": {"path": "x"}, "ema": None}
    with pytest.raises(ConfigError, match="'path' is 'x', not a section"):
        start.with_overrides(raw, {"data.path.sub": 1})


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("task: image_clasification\n")
    with pytest.raises(ConfigError, match="Did you mean 'image_classification'"):
        start.train(tmp_path / "r.yaml", tmp_path / "out")


def test_a_torn_line_of_the_log_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"ste')
    Progress(path, 2, 9, 4, True)
    assert path.read_text() == "".join(lines[:2])


def test_a_run_may_be_made_shorter_when_it_resumes_and_says_so(
    folder: Path, tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        loop._Run._one_step = before_call(5, loop._Run._one_step)  # type: ignore[method-assign]
        small.run(small.recipe(folder, schedule__epochs=2), tmp_path)

    assert small.in_children(work) == [-signal.SIGKILL]
    small.run(small.recipe(folder, schedule__epochs=1), tmp_path, resume=True)
    rows = small.log(tmp_path)
    assert rows[-1]["step"] == 6
    changed = next(row for row in rows if row["event"] == "resumed")
    assert changed == {"event": "resumed", "step": 4, "changed": {"schedule.epochs": [2.0, 1.0]}}


def test_a_checkpoint_of_an_earlier_version_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it could not yet say, it did as today's default does."""

    def work(rank: int) -> None:
        loop._Run._one_step = before_call(5, loop._Run._one_step)  # type: ignore[method-assign]
        small.run(small.recipe(folder), tmp_path)

    assert small.in_children(work) == [-signal.SIGKILL]
    plain = loop.read_info

    def older(path: Path) -> dict[str, Any]:
        info = plain(path)
        assert info["recipe"]["augment"].pop("switch_prob") == 0.5
        return info

    monkeypatch.setattr(loop, "read_info", older)
    with pytest.raises(ConfigError, match=r"other augment\.switch_prob"):
        small.run(small.recipe(folder, augment__switch_prob=0.4), tmp_path, resume=True)
    small.run(small.recipe(folder), tmp_path, resume=True)
    assert small.log(tmp_path)[-1]["step"] == 6
    assert not [row for row in small.log(tmp_path) if row["event"] == "resumed"]
