# SPDX-License-Identifier: Apache-2.0
"""Real models through the runner: batches, costs, kept patches, the command line, processes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import visprune
from tests import tiny
from tests.eval.instant import Instant, Tiling
from tests.eval.small import small_embedded
from tests.eval.task_fixtures import dump_lines, save
from visprune.backbones.vlm import embedded
from visprune.cli import commands as cli
from visprune.errors import ConfigError, UnsupportedModel
from visprune.eval.evaluate import Evaluation, run_command
from visprune.eval.llava_files import write_questions
from visprune.eval.metrics.yesno import parse_yes_no
from visprune.eval.models import vlm as models_vlm
from visprune.eval.models.base import ModelEntry, Output, Request
from visprune.eval.models.identity import weights_hash
from visprune.eval.models.load import load_model
from visprune.eval.models.vit import TimmClassifier
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.report import write_report
from visprune.eval.run.album import picture_hash
from visprune.eval.study.grid import Study, build_study
from visprune.eval.tasks import STANDARD
from visprune.eval.tasks.base import get_task
from visprune.eval.tasks.embedded.task import EmbeddedTask
from visprune.eval.tasks.imagenet import ranking_text

SCRIPTS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def vlm() -> VLM:
    torch.set_num_threads(1)
    model, processor = small_embedded()
    return VLM(model, processor, name="small", style="plain", template=models_vlm.PLAIN)


def requests(count: int, *, pictures: bool = True) -> list[Request]:
    """Questions about a picture or two; those about one know that they are."""
    task = EmbeddedTask(limit=count)
    made = []
    for sample in task.samples():
        image = sample.image() if pictures else None
        digest = None if image is None else picture_hash(image)
        made.append(Request(sample, task.prompt(sample, "plain"), image, digest))
    return made


def answers(vlm: VLM, choice: Any, asked: list[Request], size: int) -> list[Output]:
    task = EmbeddedTask()
    found: list[Output] = []
    vlm.forget()
    with vlm.answering(choice, task, "plain", vlm.generation(task, {})) as answerer:
        for start in range(0, len(asked), size):
            found += answerer(asked[start : start + size])
    return found


CHOICES: list[Any] = ["none", "no_image", "keep_all", "todre", "fastv", "pool", "random"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_batch_answers_as_each_question_alone(vlm: VLM, choice: str) -> None:
    method: Any = choice
    if choice not in ("none", "no_image"):
        budget = {} if choice == "keep_all" else {"num_keep": 30}
        method = visprune.get_method(choice, **budget)
    asked = requests(6, pictures=choice != "no_image")
    lengths = {len(vlm.processor.tokenizer(request.prompt)["input_ids"]) for request in asked}
    assert len(lengths) > 1  # so that a batch is padded
    alone, together = answers(vlm, method, asked, 1), answers(vlm, method, asked, 6)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.new_tokens, one.tokens) == (
            other.text, other.new_tokens, other.tokens,
        )  # fmt: skip
        assert (one.kv_bytes, one.kept) == (other.kv_bytes, other.kept)
        assert one.macs == other.macs is not None


def test_the_untouched_model_costs_what_keep_all_costs_and_answers_the_same(vlm: VLM) -> None:
    asked = requests(3)
    whole = answers(vlm, "none", asked, 1)
    kept = answers(vlm, visprune.get_method("keep_all"), asked, 1)
    for one, other in zip(whole, kept, strict=True):
        assert (one.text, one.tokens, one.macs, one.kv_bytes) == (
            other.text, other.tokens, other.macs, other.kv_bytes,
        )  # fmt: skip
    blind = answers(vlm, "no_image", requests(3, pictures=False), 1)[0]
    assert blind.macs is not None
    assert (blind.tokens, blind.macs["vision"], blind.macs["selection"]) == (0.0, 0, 0)
    assert 0 < blind.macs["prefill"] < (whole[0].macs or {})["prefill"]


def test_costs_and_kept_patches_are_those_of_the_run(vlm: VLM) -> None:
    asked = requests(1)
    (output,) = answers(vlm, visprune.get_method("todre", num_keep=30), asked, 1)
    with visprune.prune(vlm.model, "todre", num_keep=30) as run:
        inputs = vlm.inputs(asked, "plain")
        ids = vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        cost = run.cost(new_tokens=ids.shape[1] - inputs["input_ids"].shape[1])
        indices = run.trace.kept[0].tolist()
    assert output.macs == cost.parts
    assert output.kv_bytes == cost.kv_bytes
    assert output.kept is not None
    assert output.kept["grid"] == [24, 24]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(output.kept["kept"]), np.uint8))
    assert np.flatnonzero(bits).tolist() == sorted(indices)
    assert len(indices) == 30


def test_evaluate_gives_rows_a_table_and_a_folder(vlm: VLM, tmp_path: Path) -> None:
    result = visprune.evaluate(
        vlm.model, vlm.processor, tasks="embedded", methods=["todre"], budgets=[40, 0.5], limit=3,
        prompt_style="plain", progress=False, out=tmp_path, name="small",
    )  # fmt: skip
    labels = {row["label"] for row in result.rows}
    assert {"todre 40", "todre 50 %", "random 40", "pool 50 %", "keep_all", "no_image"} <= labels
    row = next(row for row in result.rows if row["label"] == "todre 40")
    assert (row["n"], row["errors"], row["tokens"]) == (3, 0, 40.0)
    assert row["gflops"] > 0
    assert "todre 40" in str(result)
    assert result.folder == tmp_path
    assert len(ResultsFolder(tmp_path).records()) == 3 * len(ResultsFolder(tmp_path).cells())
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 1  # three questions, one picture


def test_evaluate_without_a_folder_leaves_none(vlm: VLM) -> None:
    result = visprune.evaluate(
        vlm.model, vlm.processor, tasks="embedded", limit=2, controls=["none"], progress=False,
        prompt_style="plain",
    )  # fmt: skip
    assert isinstance(result, Evaluation)
    assert result.folder is None
    assert [record.error for record in result.records] == [None, None]


def test_a_loaded_model_is_asked_what_a_study_asks_it(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def stop(study: Study, *_: Any, **__: Any) -> None:
        asked.append([task.name for task in study.tasks])
        raise ConfigError("far enough")

    monkeypatch.setattr("visprune.eval.evaluate.run_study", stop)
    small_vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    pairs = [(vlm.model, vlm.processor), embedded.load(), (small_vit, None)]
    for model, processor in pairs:
        with pytest.raises(ConfigError, match="far enough"):
            visprune.evaluate(model, processor, methods="todre", budgets=[8], progress=False)
    assert asked == [list(STANDARD), ["embedded"], ["imagenet"]]


def test_a_vision_transformer_ranks_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, depth=3, embed_dim=24, num_heads=2, img_size=64
    )
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    drawn = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(2):
            pixels = drawn.integers(0, 255, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{number}.png")
    out = tmp_path / "out"
    result = visprune.evaluate(
        model, tasks={"task": "imagenet", "data": str(tmp_path)}, methods=["tome", "todre"],
        budgets=[{"r": 2}, {"num_keep": 8}], progress=False, batch_size=4, out=out, name="vit",
    )  # fmt: skip
    rows = {row["label"]: row for row in result.rows}
    assert rows["tome r=2"]["n"] == 6
    assert rows["tome r=2"]["tokens"] < 16.0 == rows["keep_all"]["tokens"]
    assert rows["tome r=2"]["gflops"] < rows["keep_all"]["gflops"]
    cells = {cell.label: cell for cell in ResultsFolder(out).cells().values()}
    assert "projector" in (cells["todre 8"].refused or "")
    assert "no input" in (cells["no_image"].refused or "")
    record = ResultsFolder(out).records(cells["none"].id)[0]
    with torch.inference_mode():
        from timm.data import create_transform, resolve_model_data_config

        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        picture = Image.open(tmp_path / "val" / record.sample).convert("RGB")
        ranked = model.eval()(transform(picture)[None])[0].argsort(descending=True)
    assert record.text == " ".join(map(str, ranked.tolist()))
    same = {r.sample: r.text for r in ResultsFolder(out).records(cells["keep_all"].id)}
    assert same[record.sample] == record.text


def test_the_markup_follows_style_template_and_family(vlm: VLM) -> None:
    assert vlm.markup("q?", "plain", picture=True) == "USER: <image>\nq? ASSISTANT:"
    assert vlm.markup("q?", "plain", picture=False) == "USER: q? ASSISTANT:"
    other = VLM(vlm.model, vlm.processor)
    vicuna = other.markup("q?", "llava15", picture=True)
    assert vicuna.startswith("A chat between a curious user")
    assert vicuna.endswith("USER: <image>\nq? ASSISTANT:")
    templated = other.markup("q?", "chat", picture=True)
    assert templated == other.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q?"}]}],
        add_generation_prompt=True,
    )
    braces = vlm.markup("{prompt} <image>", "plain", picture=False)
    assert braces == "USER: {prompt} <image> ASSISTANT:"


def test_weights_are_told_apart_by_their_values() -> None:
    one, other = tiny.build("llava"), tiny.build("llava")
    assert weights_hash(one) == weights_hash(other)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert weights_hash(one) != weights_hash(other)
    assert weights_hash(tiny.build("llava").to(torch.bfloat16)) != weights_hash(one)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("embeded", "no model 'embeded'. Did you mean 'embedded'"),
        ("somebody/missing-model", "cannot load.*HF_HUB_OFFLINE"),
        ("tim:vit_tiny", "Did you mean 'timm'"),
        ("timm:vit_tiny_patch16_225", "Did you mean 'vit_tiny_patch16_224'"),
        ("open_clip:ViT-B-33", "Did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32", r"random.*open_clip:ViT-B-32/PRETRAINED \(openai, laion400m_e31"),
        ("open_clip:coca_base", r"open_clip:coca_base/PRETRAINED \(none\)"),
        ("open_clip:ViT-B-32/opnai", "Did you mean 'openai'"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_model(name)


def test_model_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'float32'"):
        ModelEntry("embedded", dtype="float33")
    with pytest.raises(ConfigError, match="Unknown device"):
        load_model(ModelEntry("embedded", device="gpu9"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            load_model(ModelEntry("embedded", device="cuda:0"))


def test_the_engine_of_a_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be said without vLLM; answers are compared in tests/serving/vllm."""
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        ModelEntry("embedded", engine="vlm")
    with pytest.raises(ConfigError, match="engine_options"):
        ModelEntry("embedded", engine_options={"seed": 1})
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="needs vLLM in this environment"):
        load_model(ModelEntry("embedded", engine="vllm"))
    with pytest.raises(ConfigError, match="image classifier"):
        load_model(ModelEntry("timm:vit_tiny_patch16_224", engine="vllm"))
    with pytest.raises(ConfigError, match="not a loaded one"):
        visprune.evaluate(*small_embedded(), engine="vllm")
    engine = {"name": "embedded", "engine": "vllm"}
    assert ModelEntry("embedded").to_dict().keys() & {"engine", "engine_options"} == set()
    assert ModelEntry(**engine).to_dict()["engine"] == "vllm"
    assert build_study({"models": [engine]}).batch_size is None  # as many as it likes
    with pytest.raises(ConfigError, match="leave speed out"):
        build_study({"models": [engine], "speed": True})


def test_a_model_without_an_adapter_answers_untouched_only(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(model: Any) -> Any:
        raise UnsupportedModel("It has no adapter.")

    monkeypatch.setattr(models_vlm, "find_adapter", none)
    other = VLM(vlm.model, vlm.processor, style="plain", template=models_vlm.PLAIN)
    assert other.refusal(visprune.get_method("keep_all"), EmbeddedTask()) == "It has no adapter."
    assert other.refusal("none", EmbeddedTask()) is None
    (output,) = answers(other, "none", requests(1), 1)
    assert output.macs is None
    assert output.tokens is None


def test_a_dry_run_lists_counts_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changes = {
        "models": ["embedded", "somebody/elsewhere"], "tasks": ["embedded"], "limit": 2,
        "methods": ["todre"], "budgets": [16], "controls": ["none"],
    }  # fmt: skip
    options: dict[str, Any] = {"retry_errors": False, "threads": None, "answers": None}
    run_command(None, out, changes, dry_run=True, **options)
    said = " ".join(capsys.readouterr().out.split())
    assert "todre 16" in said
    assert "4 cells, 8 samples to ask" in said
    assert "no estimate for somebody/elsewhere" in said
    assert not out.exists()


@pytest.mark.slow
def test_two_processes_of_accelerate_launch(tmp_path: Path) -> None:
    """The command line in two processes on the CPU: one folder, each sample once, one table."""
    out = tmp_path / "out"
    words = [
        str(SCRIPTS / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        str(SCRIPTS / "visprune"), "eval", "--model", "embedded", "--task", "embedded",
        "--method", "todre", "--num-keep", "32", "--no-controls", "--limit", "12", "--out",
        str(out), "--answers", str(tmp_path / "answers"), "--threads", "1",
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=500, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = ResultsFolder(out)
    seen = [values["sample"] for values in folder.lines()]
    assert len(seen) == len(set(seen)) == 12
    ranks = sorted((e["rank"], e["processes"]) for e in folder.environments().values())
    assert ranks == [(0, 2), (1, 2)]
    assert done.stdout.count("todre 32") == 1  # one table, of rank 0
    assert len(list((tmp_path / "answers").glob("*.jsonl"))) == 1


def test_a_picture_that_is_cropped_says_which_part_was_seen(vlm: VLM) -> None:
    (request,) = requests(1)
    assert request.image is not None
    method = visprune.get_method("pool", num_keep=16)
    (square,) = answers(vlm, method, [request], 1)
    wide = Request(request.sample, request.prompt, request.image.resize((400, 100)))
    (cut,) = answers(vlm, method, [wide], 1)
    assert square.kept is not None
    assert cut.kept is not None
    assert "box" not in square.kept
    assert cut.kept["box"] == [0.375, 0.0, 0.625, 1.0]  # the middle quarter of the width


def test_a_folder_of_a_timm_model_is_an_image_classifier(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = load_model(str(tmp_path))
    assert not loaded.generates
    assert loaded.describe()["weights"] == weights_hash(model)


def test_a_saved_model_brings_its_method_and_what_that_has_learned(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args).eval()
    run = visprune.prune(model, "dynamicvit", keep_ratio=0.5)
    visprune.save_pretrained(run, folder, model_args=args)
    pictures = tmp_path / "pictures"
    for number, color in enumerate(("red", "green", "blue")):
        (pictures / color).mkdir(parents=True)
        Image.effect_noise((32, 32), 90 + number).save(pictures / color / "a.png")
    task = {"task": "folder", "path": str(pictures), "metric_name": "top1"}
    made = build_study({"models": [str(folder)], "tasks": [task], "controls": ["none"]})
    labels = [variant.label for variant in made.variants]
    assert labels[0] == "none"
    assert labels[1].startswith("dynamicvit")
    loaded, choice = load_model(str(folder)), made.variants[1].choice
    assert loaded.refusal(choice, made.tasks[0]) is None
    picture = Image.open(pictures / "red" / "a.png").convert("RGB")
    sample = made.tasks[0].samples()[0]
    with loaded.answering(choice, made.tasks[0], "plain", {}) as ask:
        (answer,) = ask([Request(sample, "", picture)])
    with torch.inference_mode():
        want = run.adapter.model(loaded.transform(picture)[None])
    assert answer.text == ranking_text(want)[0]
    run.remove()
    untrained = TimmClassifier(model, name="dense")
    assert "comes without one" in untrained.refusal(choice, made.tasks[0])


def ended(monkeypatch: pytest.MonkeyPatch, words: str) -> int | str | None:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["visprune", *words.split()])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_flags_become_a_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").touch()
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "visprune.eval.evaluate.run_command", lambda *args, **options: seen.append((args, options))
    )
    words = (
        "eval s.yaml --model embedded --task embedded --task-option limit=3 --method todre "
        "--method fastv --method pyramiddrop,depths=[0.25,0.5],factor=0.4 "
        "--num-keep 64 --keep-ratio 0.5 --limit 9 --seed 1 --seed 2 --no-controls "
        "--attention eager --max-new-tokens 5 --dry-run --out o"
    )
    assert not ended(monkeypatch, words)
    ((path, out, changes), options) = seen[0]
    assert (path, out, options["dry_run"]) == (Path("s.yaml"), Path("o"), True)
    assert changes == {
        "models": [{"name": "embedded", "attention": "eager"}],
        "tasks": [{"task": "embedded", "limit": 3}],
        "methods": [
            "todre",
            "fastv",
            {"method": "pyramiddrop", "depths": [0.25, 0.5], "factor": 0.4},
        ],
        "budgets": [64, 0.5],
        "limit": 9,
        "seeds": [1, 2],
        "controls": False,
        "generation": {"max_new_tokens": 5},
    }
    build_study(changes)
    seen.clear()
    words = "eval s.yaml --dtype float32 --device cpu --task-option split=train --limit 9 --out o"
    ended(monkeypatch, words)
    ((_, _, changes), _) = seen[0]
    assert changes == {
        "model_options": {"dtype": "float32", "device": "cpu"},
        "task_options": {"split": "train"}, "limit": 9,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["tome,r=13", "tome,r=77"])
def test_the_example_of_the_help_can_be_planned_and_says_what_it_leaves_out(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"eval --model embedded --task embedded --limit 2 --method {method} --dry-run"
    assert not ended(monkeypatch, words)
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: random, uniform, pool" in said
    assert "4 cells, 8 samples to ask" in said


def test_a_model_that_cannot_do_the_task_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"eval --model embedded --task imagenet --out {tmp_path}"
    assert ended(monkeypatch, words) == 2
    said = capsys.readouterr().err
    assert said.count("wants class numbers") == 1
    assert "visprune: Nothing of the study can run: imagenet wants class numbers" in said


def test_the_command_asks_times_prints_and_writes_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {
        "models": ["embedded"], "tasks": ["embedded"], "limit": 2, "methods": ["todre"],
        "budgets": [16], "controls": ["none"],
        "speed": {"rounds": 1, "warmup": 0, "batches": [1], "new_tokens": 2},
    }  # fmt: skip
    run_command(
        None, tmp_path / "out", changes, dry_run=False, retry_errors=False, threads=None,
        answers=tmp_path / "answers",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "todre 16" in said
    assert "visprune report" in said
    assert len(ResultsFolder(tmp_path / "out").speed()) == 2
    answers_files = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert [name.split("_seed")[0] for name in answers_files] == [
        "embedded_none", "embedded_todre_16",
    ]  # fmt: skip


def _pope_by_line(questions: Path, answers: Path, labels: Mapping[str, Sequence[str]]) -> float:
    """Mean F1 by the rule of LLaVA's ``eval_pope.py``.

    The answers of a split, in the order of the answer file, are paired with the lines of the
    split's label file by their place; ids only say which split an answer is of.
    """
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    split = {row["question_id"]: row["category"] for row in rows}
    said = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    figures = []
    for name, right in labels.items():
        mine = [
            parse_yes_no(a["text"], "llava")[0] for a in said if split[a["question_id"]] == name
        ]
        pairs = Counter(zip(mine, right, strict=True))
        hits = pairs["yes", "yes"]
        wrong = pairs["yes", "no"] + pairs["no", "yes"]
        figures.append(2 * hits / (2 * hits + wrong))
    return 100 * fmean(figures)


def test_official_scorers_that_pair_by_line_agree_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {}
    for split in ("random", "popular", "adversarial"):
        # More than nine: as texts, "adversarial/10" comes before "adversarial/2".
        labels[split] = ["yes" if n * n % 7 in (1, 2) else "no" for n in range(1, 24)]
        rows = [
            {"question_id": n, "image": "a.jpg", "text": f"Is there a {n}?", "label": label}
            for n, label in enumerate(labels[split], start=1)
        ]
        dump_lines(tmp_path / f"data/coco_pope_{split}.json", rows)
    save(tmp_path / "data/val2014/a.jpg")

    class Guessing(Instant):
        def _answer(self, requests: Sequence[Request]) -> list[Output]:
            numbers = [int(request.sample.id.split("/")[1]) for request in requests]
            return [Output(text="Yes" if n % 3 == 1 else "No") for n in numbers]

    monkeypatch.setattr("visprune.eval.run.runner.load_model", lambda *_, **__: Guessing())
    run_command(
        None, tmp_path / "out",
        {"models": ["embedded"], "tasks": [{"task": "pope", "data": str(tmp_path / "data")}],
         "controls": ["none"]},
        dry_run=False, retry_errors=False, threads=None, answers=tmp_path / "answers",
    )  # fmt: skip
    task = get_task("pope", data=str(tmp_path / "data"))
    write_questions(task, tmp_path / "questions.jsonl")
    (file,) = (tmp_path / "answers").iterdir()
    score = task.aggregate(ResultsFolder(tmp_path / "out").records())["score"]
    assert _pope_by_line(tmp_path / "questions.jsonl", file, labels) == pytest.approx(score)
    assert 20 < score < 80


def _failing(path: Path, monkeypatch: pytest.MonkeyPatch, failing: range) -> None:
    model = Instant(failing=tuple(failing))
    monkeypatch.setattr("visprune.eval.run.runner.load_model", lambda *_, **__: model)
    changes = {"models": ["embedded"], "tasks": [Tiling(limit=4)], "controls": ["none"]}
    run_command(
        None, path, changes, dry_run=False, retry_errors=False, threads=None,
        answers=path / "answers",
    )  # fmt: skip


def test_a_run_in_which_every_sample_fails_ends_with_1_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        _failing(tmp_path / "all", monkeypatch, range(4))
    assert done.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    reason = "The commonest reason: RuntimeError: The shapes of question"
    assert f"Every sample failed, of 4 samples. {reason} 0 do not fit." in said
    _failing(tmp_path / "some", monkeypatch, range(2, 3))
    said = " ".join(capsys.readouterr().out.split())
    assert f"1 failed, of 4 samples. {reason} 2 do not fit." in said
    assert "samples that failed have no line" in said
    _failing(tmp_path / "none", monkeypatch, range(0))
    assert "failed" not in capsys.readouterr().out


def test_a_row_of_which_no_picture_can_be_read_ends_with_1_though_others_were_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No_image, a control by default, is answered also where the folder of pictures is wrong."""
    monkeypatch.setattr("visprune.eval.run.runner.load_model", lambda *_, **__: Instant())
    task = Tiling(limit=4, broken=tuple(range(4)))
    changes = {"models": ["embedded"], "tasks": [task], "controls": ["none", "no_image"]}
    with pytest.raises(SystemExit) as done:
        run_command(
            None, tmp_path, changes, dry_run=False, retry_errors=False, threads=None, answers=None
        )
    assert done.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "4 failed, of 8 samples. The commonest reason: SampleError: The picture cannot" in said
    assert "Nothing at all was answered under none (tiling)." in said
    assert "asked again with --retry-errors" in said


def test_questions_longer_than_the_model_s_positions_are_marked(tmp_path: Path) -> None:
    from visprune.eval.run.progress import Silent
    from visprune.eval.run.runner import run_study
    from visprune.eval.study.grid import build_study

    model, processor = small_embedded()
    places = model.config.get_text_config().max_position_embeddings
    rows = [{"id": str(i), "question": "what color is the circle? " * count, "answers": ["red"],
             "image": "a.png"} for i, count in enumerate((1, places // 4, 1))]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    vlm = VLM(model, processor, name="small", style="plain", template=PLAIN)
    task = {"task": "folder", "path": str(tmp_path / "q.jsonl")}
    study = build_study({"models": ["small"], "tasks": [task], "controls": ["none", "random"],
                         "budgets": [16], "batch_size": 2})  # fmt: skip
    folder = run_study(study, tmp_path / "out", loader=lambda spec: vlm, progress=progress)
    for record in folder.records():
        assert record.error is None
        words = 6 * (places // 4) + 576 - places
        if record.sample == "1":
            assert record.beyond is not None
            assert abs(record.beyond - words) < 20
        else:
            assert record.beyond is None
    assert sum("longer than the positions" in note for note in notes) == 1
    tables = (write_report(tmp_path / "out")["markdown"]).read_text()
    assert "2 of 6 answers are to questions longer than the positions" in tables
