# SPDX-License-Identifier: Apache-2.0
"""A vision-language model's own weights: new words, shared pictures, frozen parts, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import visprune
from visprune.backbones.vlm import embedded
from visprune.errors import ConfigError
from visprune.eval.models.base import ModelEntry, Request
from visprune.eval.models.load import load_model
from visprune.eval.tasks.base import get_task
from visprune.machine.sharing import encode_images
from visprune.train.start import train
from visprune.train.vlm import tune
from visprune.train.vlm.learner import add_words
from visprune.train.vlm.questions import Collator, GroupedQuestions, Questions
from visprune.train.vlm.recipe import TaskSection
from visprune.train.vlm.scores import score

COLOURS = {"crimson": (220, 20, 40), "azure": (30, 60, 240)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plain pictures and three questions about each, with words that the model lacks."""
    folder = tmp_path_factory.mktemp("bench")
    rows = []
    for name, rgb in COLOURS.items():
        Image.new("RGB", (96, 96), rgb).save(folder / f"{name}.png")
        other = next(word for word in COLOURS if word != name)
        asked = {"Which tint?": name, f"Maybe {name} ?": "yes", f"Maybe {other} ?": "no"}
        rows += [
            {"image": f"{name}.png", "question": q, "answers": [a], "kind": "tint"}
            for q, a in asked.items()
        ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "asked.jsonl"


def recipe(bench: Path, **changes: Any) -> dict[str, Any]:
    options = {"path": str(bench), "instruction": ""}
    raw: dict[str, Any] = {
        "task": "vlm_finetune",
        "model": "embedded",
        "device": "cpu",
        "vocabulary": {"min_count": 1},
        "questions_per_picture": 3,
        "train": {"task": "folder", "options": options},
        "test": {"task": "folder", "options": options},
        "trainer": {
            "max_steps": 30,
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-3,
            "logging_steps": 10,
            "save_steps": 15,
        },
    }
    return {**raw, **changes}


def run(raw: dict[str, Any], out: Path, resume: bool = False) -> dict[str, Any]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(raw))
    return train(path, out, resume=resume)


@pytest.fixture(scope="module")
def tuned(
    bench: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    out = tmp_path_factory.mktemp("tune") / "run"
    raw = recipe(bench, prune={"method": "pool", "args": {"num_keep": 16}})
    return out, raw, run(raw, out)


def test_it_learns_words_that_it_did_not_have(
    tuned: tuple[Path, dict[str, Any], dict[str, Any]],
) -> None:
    out, _, result = tuned
    assert result["score"]["pruned_tuned"] == 100.0
    assert result["score"]["dense"] < 50.0
    # Two tints, "yes" and "no" twice each: no constant answer reaches more than a third.
    assert result["floors"]["majority"] == pytest.approx(100 / 3)
    assert not (out / "adapter").exists()


def test_the_folder_is_asked_as_it_was_taught(
    tuned: tuple[Path, dict[str, Any], dict[str, Any]], bench: Path
) -> None:
    folder = tuned[0] / "weights"
    vlm: Any = load_model(ModelEntry(str(folder), device="cpu"))
    assert vlm.style == "plain"
    assert vlm.template == "USER: <image>\n{prompt} ASSISTANT:"
    task = get_task("folder", path=str(bench), instruction="")
    sample = task.samples()[0]
    request = Request(sample, task.prompt(sample, vlm.style), sample.image())
    method = visprune.get_method("pool", num_keep=16)
    with vlm.answering(method, task, vlm.style, vlm.generation(task, {})) as answer:
        assert answer([request])[0].text == "crimson"
    other: Any = load_model(ModelEntry(str(folder), device="cpu", template="{prompt} <image>"))
    assert other.template == "{prompt} <image>"
    model, method_in_force = visprune.load_pretrained(folder)
    assert method_in_force is not None
    assert model.config.text_config.vocab_size == len(vlm.processor.tokenizer)


def test_a_draw_of_questions_is_scored_in_its_order(
    tuned: tuple[Path, dict[str, Any], dict[str, Any]], bench: Path, tmp_path: Path
) -> None:
    """The shipped recipes score a draw of their test questions, by a seed of the task's own."""
    rows = [json.loads(line) for line in bench.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"id": str(number), "image": str(bench.with_name(row["image"]))}
        row["answers"] = ["never"] if number % 2 else row["answers"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"path": str(tmp_path / "asked.jsonl"), "instruction": "", "limit": 4, "seed": 1}
    drawn = [int(sample.id) for sample in get_task("folder", **options).samples()]
    assert drawn != [0, 1, 2, 3]
    vlm: Any = load_model(ModelEntry(str(tuned[0] / "weights"), device="cpu"))
    found = score(vlm, None, TaskSection(task="folder", options=options))
    assert found["dense"] == [1.0 - number % 2 for number in drawn]


def test_a_stopped_run_resumes_to_the_same_weights(
    tuned: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    out, raw, _ = tuned
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "score", lambda *_, **__: {"dense": [1.0] * 6, "pruned": [1.0] * 6})
        step = torch.optim.AdamW.step
        count = 0

        def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == 20:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.optim.AdamW, "step", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(raw, cut)
        run(raw, cut, resume=True)
    whole = load_model(ModelEntry(str(out / "weights"), device="cpu"))
    again = load_model(ModelEntry(str(cut / "weights"), device="cpu"))
    want, got = whole.model.state_dict(), again.model.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_frozen_parts_stay(bench: Path, tmp_path: Path) -> None:
    raw = recipe(bench, freeze=["vision_tower", "projector"], encode_once=True)
    raw["questions_per_picture"] = 1
    raw["trainer"] = {**raw["trainer"], "max_steps": 2, "save_steps": 2}
    run(raw, tmp_path / "out")
    before = embedded.load()[0].state_dict()
    model, _ = visprune.load_pretrained(tmp_path / "out" / "weights")
    after = model.state_dict()
    tower = [k for k in before if "vision_tower" in k or "projector" in k]
    decoder = [k for k in before if "language_model.layers.0" in k]
    assert tower
    assert all(torch.equal(before[key], after[key]) for key in tower)
    assert not any(torch.equal(before[key], after[key]) for key in decoder if "proj" in key)


def test_pictures_shared_in_a_batch_give_the_loss_and_gradients_of_single_ones(bench: Path) -> None:
    def gradients(grouped: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        vlm: Any = load_model(ModelEntry("embedded", device="cpu"))
        questions = Questions(get_task("folder", path=str(bench), instruction=""))
        torch.manual_seed(0)
        add_words(vlm, questions, 1)
        if grouped:
            batch = (collator := GroupedQuestions(vlm, questions, 3, 0))(
                [collator.dataset[i] for i in range(2)]
            )
            assert batch["pixels"]["pixel_values"].shape[0] == 2
            batch["mm_encoder_outputs"] = encode_images(
                vlm.model, grad=True, **batch.pop("pixels")
            ).select(batch.pop("pictures").tolist())
        else:
            groups = GroupedQuestions(vlm, questions, 3, 0).dataset
            batch = Collator(vlm, questions)([n for i in range(2) for n in groups[i]])
        loss = vlm.model.train()(**batch).loss
        loss.backward()
        return loss.detach(), {
            n: p.grad for n, p in vlm.model.named_parameters() if p.grad is not None
        }

    (want, wanted), (got, gotten) = gradients(False), gradients(True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert wanted.keys() == gotten.keys()
    assert any("vision_tower" in name for name in wanted)
    # One scale for all: the gradient of a key's bias is zero but for rounding.
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(gotten[name] / scale, gradient / scale, atol=1e-5, rtol=0)


def test_groups_hold_every_question_once_and_one_picture_each(bench: Path) -> None:
    vlm: Any = load_model(ModelEntry("embedded", device="cpu"))
    questions = Questions(get_task("folder", path=str(bench), instruction=""))
    groups = [*GroupedQuestions(vlm, questions, 2, 0).dataset]  # type: ignore[call-overload]
    assert sorted(n for group in groups for n in group) == list(range(6))
    assert sorted(len(group) for group in groups) == [1, 1, 2, 2]
    for group in groups:
        assert len({questions.samples[n].cluster for n in group}) == 1


def test_new_words_leave_the_old_logits_as_they_were(bench: Path) -> None:
    vlm: Any = load_model(ModelEntry("embedded", device="cpu"))
    task = get_task("embedded", split="test", limit=2)
    requests = [Request(s, task.prompt(s, vlm.style), s.image()) for s in task.samples()]
    inputs = vlm.inputs(requests, vlm.style)
    with torch.no_grad():
        before = vlm.model(**inputs).logits
    new = add_words(vlm, Questions(get_task("folder", path=str(bench), instruction="")), 1)
    assert new[0] == "maybe"
    assert {"crimson", "azure", "tint"} <= {*new}
    assert "yes" not in new
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.unk_token_id not in tokenizer("Maybe crimson?")["input_ids"]
    assert {key: value.tolist() for key, value in vlm.inputs(requests, vlm.style).items()} == {
        key: value.tolist() for key, value in inputs.items()
    }
    with torch.no_grad():
        after = vlm.model(**inputs).logits
    assert after.shape[-1] == len(tokenizer) == before.shape[-1] + len(new)
    assert torch.equal(after[..., : before.shape[-1]], before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 4}}, "section lora belongs to task: vlm_lora"),
        ({"task": "vlm_lora"}, "freeze and vocabulary belong to task: vlm_finetune"),
        ({"freeze": ["nothing_here"]}, "'nothing_here' finds no parameter"),
        ({"freeze": [""]}, "leave nothing to train"),
        ({"freeze": ["("]}, "no regular expression"),
        ({"questions_per_picture": 0}, "at least 1"),
        ({"vocabulary": {"min_count": 0}}, "min_count must be at least 1"),
        ({"encode_once": True}, "leave questions_per_picture at 1"),
        ({"encode_once": True, "questions_per_picture": 1}, "encode_once: .* is trained"),
    ],
)
def test_wrong_recipes_are_refused(
    changes: dict[str, Any],
    message: str,
    bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "score", lambda *_, **__: {"dense": [0.0], "pruned": [0.0]})
    with pytest.raises(ConfigError, match=message):
        run(recipe(bench, **changes), tmp_path / "out")


def test_a_tokenizer_of_pieces_needs_no_words(bench: Path) -> None:
    vlm: Any = load_model(ModelEntry("embedded", device="cpu"))
    vlm.processor.tokenizer = object()
    with pytest.raises(ConfigError, match="one token per word"):
        add_words(vlm, Questions(get_task("folder", path=str(bench))), 1)
