# SPDX-License-Identifier: Apache-2.0
"""Adapters under a method: what is learned, what is scored, what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import visprune
from visprune.backbones.vlm import embedded
from visprune.errors import ConfigError
from visprune.eval.models.base import ModelEntry
from visprune.eval.models.load import load_model
from visprune.eval.tasks.base import get_task
from visprune.machine.sharing import EncodedImages
from visprune.train.start import train
from visprune.train.vlm import trainer, tune
from visprune.train.vlm.questions import (
    IGNORE,
    Collator,
    EncodedQuestions,
    Questions,
    with_answers,
)


def recipe(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "task": "vlm_lora",
        "model": "embedded",
        "device": "cpu",
        "prune": {"method": "pool", "args": {"num_keep": 30}},
        "lora": {"r": 4, "alpha": 8},
        "train": {"task": "embedded", "options": {"split": "train", "limit": 14}},
        "test": {"task": "embedded", "options": {"limit": 7}},
        "encode_once": True,
        "trainer": {
            "max_steps": 12,
            "per_device_train_batch_size": 7,
            "learning_rate": 5e-3,
            "logging_steps": 2,
            "save_steps": 6,
        },
    }
    for key, value in changes.items():
        *way, last = key.split("__")
        place = raw
        for part in way:
            place = place.setdefault(part, {})
        place[last] = value
    return raw


def run(raw: dict[str, Any], out: Path, resume: bool = False) -> dict[str, Any]:
    out.parent.mkdir(exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(raw))
    return train(path, out, resume=resume)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("lora") / "run"
    return out, run(recipe(), out)


def test_an_adapter_learns_under_the_method(tuned: tuple[Path, dict[str, Any]]) -> None:
    out, result = tuned
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    assert {"questions_per_s", "seconds_left"} <= rows[-1].keys()
    assert result["score"].keys() == {"dense", "pruned", "dense_tuned", "pruned_tuned"}
    assert result["test_questions"] == 7
    assert result["steps"] == 12
    lost = result["score"]["dense"] - result["score"]["pruned"]
    assert result["lost"] == pytest.approx(lost)
    if lost > 0:
        gained = result["score"]["pruned_tuned"] - result["score"]["pruned"]
        assert result["recovered_share"] == pytest.approx(gained / lost)
    assert json.loads((out / "result.json").read_text())["score"] == result["score"]


def test_only_the_decoder_changed_and_the_folder_comes_back_pruned(
    tuned: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = tuned
    before = embedded.load()[0].state_dict()
    model, back = visprune.load_pretrained(out / "weights")
    assert back is not None
    assert back.method.to_dict()["num_keep"] == 30
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("language_model.layers" in name for name in changed)
    back.remove()
    merged = PeftModel.from_pretrained(embedded.load()[0], str(out / "adapter"))
    merged = merged.merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=1e-5)
    # Asked as `visprune eval` asks: the folder is a model like any other.
    again = load_model(ModelEntry(str(out / "weights"), dtype="float32", device="cpu"))
    assert type(again).__name__ == "VLM"


def test_a_stopped_run_resumes_to_the_same_adapter(
    tuned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, plain = tmp_path / "cut", trainer.Log.on_log

    def stopping(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.global_step == 8:
            raise KeyboardInterrupt
        return plain(self, args, state, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Log, "on_log", stopping)
        patch.setattr(tune, "score", lambda *_, **__: {"dense": [1.0] * 7, "pruned": [1.0] * 7})
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), out)
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        run(recipe(), out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "score", lambda *_, **__: {"dense": [1.0] * 7, "pruned": [1.0] * 7})
        run(recipe(), out, resume=True)
    want = load_file(tuned[0] / "adapter" / "adapter_model.safetensors")
    got = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_answers_stand_behind_prompts() -> None:
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    made = with_answers(ids, mask, [[1, 2], [3]])
    assert made["input_ids"].tolist() == [[0, 5, 6, 1, 2], [7, 8, 9, 3, 0]]
    assert made["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    labels = [[IGNORE] * 3 + [1, 2], [IGNORE] * 3 + [3, IGNORE]]
    assert made["labels"].tolist() == labels


def test_encoded_once_is_the_same_loss() -> None:
    vlm: Any = load_model(ModelEntry("embedded", device="cpu"))
    questions = Questions(get_task("embedded", split="train", limit=9))
    numbers = [0, 8, 3]
    with visprune.prune(vlm.model, "todre", num_keep=20), torch.no_grad():
        want = vlm.model(**Collator(vlm, questions)(numbers)).loss
        once = EncodedQuestions(vlm, questions)
        assert len(once.features) == 2
        batch = once(numbers)
        pictures = batch.pop("pictures").tolist()
        encoded = EncodedImages(once.features).select(pictures)
        got = vlm.model(**batch, mm_encoder_outputs=encoded).loss
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__target_modules": [".*q_proj"]}, "target_modules"),
        (
            {"lora__target_modules": r".*vision_tower.*\.q_proj"},
            "encode_once: .*q_proj",
        ),
        ({"lora__rank": 3}, "unknown key 'rank'"),
        ({"trainer__lerning_rate": 1.0}, "Did you mean 'learning_rate'"),
        ({"trainer__seed": 1}, "is set by the run itself"),
        ({"prune__method": "todrre"}, "Did you mean 'todre'"),
        ({"train__task": "embeded"}, "Did you mean 'embedded'"),
        ({"lora__r": 0}, "at least 1"),
    ],
)
def test_wrong_recipes_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "score", lambda *_, **__: {"dense": [0.0], "pruned": [0.0]})
    with pytest.raises(ConfigError, match=message):
        run(recipe(**changes), tmp_path / "out")
