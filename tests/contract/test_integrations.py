# SPDX-License-Identifier: Apache-2.0
"""A pruned model works where an untouched one does: Trainer, PEFT, Accelerate, pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline

import visprune
from tests import tiny
from tests.contract import oracle
from tests.contract.cases import batch, every_family, few
from visprune.backbones.vlm import embedded

METHODS = pytest.mark.parametrize("name", ["todre", "fastv", "pyramiddrop", "pool"])
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def results(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(**inputs).logits.nan_to_num(), model.generate(**inputs, **GREEDY)


def assert_same(got: Any, want: Any) -> None:
    assert oracle.error(got[0], want[0]) <= 1e-5
    assert torch.equal(got[1], want[1])


# PEFT ----------------------------------------------------------------------------------------


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", ["todre", "pyramiddrop"])
@every_family
def test_lora_around_the_model(name: str, family: str) -> None:
    inputs, params = batch(family), few(name)
    merged = with_lora(tiny.build(family)).merge_and_unload()
    with visprune.prune(merged, name, **params):
        want = results(merged, inputs)
    before = tiny.build(family)
    plain = results(before, inputs)
    wrapped = with_lora(before)
    unpruned = results(wrapped, inputs)
    assert oracle.error(unpruned[0], plain[0]) > 1e-3  # the adapter changes the model
    with visprune.prune(wrapped, name, **params) as run:
        assert_same(results(wrapped, inputs), want)
        assert len(run.trace.kept) == 3
    assert torch.equal(results(wrapped, inputs)[0], unpruned[0])
    # Pruned first, wrapped after.
    model = tiny.build(family)
    run = visprune.prune(model, name, **params)
    later = with_lora(model)
    assert_same(results(later, inputs), want)
    run.remove()
    assert torch.equal(results(later, inputs)[0], unpruned[0])


@every_family
def test_lora_trains_through_a_pruned_model(family: str) -> None:
    model, inputs = with_lora(tiny.build(family)).train(), batch(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with visprune.prune(model, "todre", num_keep=5, tau=0.0):
        model(**inputs, labels=labels).loss.backward()
    assert trainable
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable)
    assert sum(float(p.grad.abs().sum()) for p in trainable) > 0


# Accelerate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "family", "name"),
    [
        ("dispatch", "llava", "todre"),
        ("dispatch", "qwen2_5_vl", "pyramiddrop"),
        ("dispatch", "llava_next", "fastv"),
        ("cpu_offload", "qwen2_vl", "pyramiddrop"),
        ("cpu_offload", "llava", "visionzip"),
        ("disk_offload", "llava", "todre"),
    ],
)
@pytest.mark.parametrize("order", ["placed_first", "pruned_first"])
def test_dispatched_models(
    place: str, family: str, name: str, order: str, tmp_path: Path, models: Any
) -> None:
    inputs, params = batch(family, [[3, "a", 6], [2, "b", 9]]), few(name)
    with visprune.prune(models(family), name, **params):
        want = results(models(family), inputs)
    model = tiny.build(family)
    run = visprune.prune(model, name, **params) if order == "pruned_first" else None
    if place == "dispatch":
        model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif place == "cpu_offload":
        model = cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    if place != "dispatch":
        assert next(model.parameters()).device.type == "meta"
    run = run or visprune.prune(model, name, **params)
    assert_same(results(model, inputs), want)
    run.remove()
    assert_same(results(model, inputs), results(models(family), inputs))
    remove_hook_from_submodules(model)


# Trainer -------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Four prompts with their labels."""

    def __init__(self, family: str) -> None:
        letters = "abde"
        self.rows = [batch(family, [[3, letter, 6]]) for letter in letters]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    out = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    text = out["input_ids"] != tiny.IMAGE
    return {**out, "labels": out["input_ids"].masked_fill(~text, -100)}


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("llava", True), ("llava_next", False), ("qwen2_vl", False), ("qwen2_5_vl", True)],
)
def test_trainer_takes_two_steps(family: str, checkpointing: bool, tmp_path: Path) -> None:
    model = tiny.build(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        save_strategy="no", use_cpu=True, remove_unused_columns=False, learning_rate=1e-2,
        logging_steps=1, disable_tqdm=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    with visprune.prune(model, "fastv", num_keep=5) as run:
        trainer = Trainer(model, arguments, train_dataset=Rows(family), data_collator=collate)
        result = trainer.train()
    assert result.global_step == 2
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert [len(kept) for kept in run.trace.kept] == [5, 5]
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("language_model" in name for name in changed)
    assert any("vision" in name or "visual" in name for name in changed)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# pipeline ------------------------------------------------------------------------------------


@METHODS
def test_pipeline(name: str) -> None:
    torch.manual_seed(0)
    words = ["what", "is", "this", "?", "red", "blue", "one"]
    processor = embedded.build_processor(words)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {**small, "num_hidden_layers": 4, "num_key_value_heads": 2}
    small["num_hidden_layers"] = 2
    model = embedded.build_model(len(processor.tokenizer), vision=small, text=text).eval()
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    picture = Image.effect_noise((192, 192), 80).convert("RGB")
    question = embedded.PROMPT.format(question="what is this ?")
    options = {"generate_kwargs": {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}}
    want = ask(images=[picture], text=question, **options)[0]["generated_text"]
    with visprune.prune(model, "keep_all"):
        assert ask(images=[picture], text=question, **options)[0]["generated_text"] == want
    with visprune.prune(ask.model, name, **few(name, 32)) as run:
        got = ask(images=[picture], text=question, **options)[0]["generated_text"]
    assert run.trace.num_tokens == [576]
    assert len(run.trace.kept[0]) <= 32
    inputs = processor(images=[picture], text=question, return_tensors="pt")
    with torch.no_grad(), visprune.prune(model, name, **few(name, 32)):
        answer = model.generate(**inputs, **options["generate_kwargs"])
    assert processor.decode(answer[0], skip_special_tokens=True).split()[-4:] == got.split()[-4:]


# Wrappers ------------------------------------------------------------------------------------


def test_data_parallel_wrappers_are_seen_through(models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    with visprune.prune(model, "uniform", num_keep=5):
        want = results(model, inputs)
    with visprune.prune(nn.DataParallel(model), "uniform", num_keep=5) as run:
        assert_same(results(model, inputs), want)
    assert len(run.trace.kept) == 3
