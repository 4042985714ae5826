# SPDX-License-Identifier: Apache-2.0
"""Whatever changes an answer is in the cell's identity: nothing is taken for an answer to it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import visprune.backbones.vit as vit
from tests.eval.small import small_embedded
from tests.eval.task_fixtures import dump_lines
from visprune.errors import ConfigError
from visprune.eval.evaluate import evaluate
from visprune.eval.models import vlm as models_vlm
from visprune.eval.models.identity import structure_hash, transform_hash
from visprune.eval.models.vit import TimmClassifier, ZeroShot
from visprune.eval.models.vlm import VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.run.jobs import jobs_of
from visprune.eval.study.grid import build_study

STUDY: dict[str, Any] = {
    "models": ["small"], "tasks": [{"task": "embedded", "limit": 4}], "controls": ["none"],
    "methods": [{"method": "fastv", "num_keep": 8}],
}  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return small_embedded()


def vlm(parts: tuple[Any, Any], **options: Any) -> VLM:
    settings = {"name": "small", "style": "plain", "template": models_vlm.PLAIN}
    return VLM(*map(copy.deepcopy, parts), **settings | options)


def cells(model: Any, **changes: Any) -> set[str]:
    return {job.cell.id for job in jobs_of(build_study({**STUDY, **changes}), model)}


def other_layer(model: VLM) -> None:
    model.model.config.vision_feature_layer = -1


def other_rotary_base(model: VLM) -> None:
    model.model.config.text_config.rope_parameters["rope_theta"] = 10_000.0


def other_chat_template(model: VLM) -> None:
    model.processor.chat_template = "Q: {{ messages[0]['content'] }} A:"


def other_mean(model: VLM) -> None:
    model.processor.image_processor.image_mean = [0.5, 0.4, 0.3]


def other_words(model: VLM) -> None:
    model.processor.tokenizer.add_tokens(["unheard"])


def other_end(model: VLM) -> None:
    model.model.generation_config.eos_token_id = 3


def other_penalty(model: VLM) -> None:
    model.model.generation_config.repetition_penalty = 1.5


def other_weight(model: VLM) -> None:
    with torch.no_grad():
        next(model.model.parameters()).reshape(-1)[0] += 1e-3
    model.__init__(model.model, model.processor, name="small", style="plain",  # type: ignore[misc]
                   template=models_vlm.PLAIN)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [other_layer, other_rotary_base, other_chat_template, other_mean, other_words, other_end,
     other_penalty, other_weight],
)  # fmt: skip
def test_what_is_no_argument_of_a_study_counts_too(
    parts: tuple[Any, Any], change: Callable[[VLM], None]
) -> None:
    before, model = cells(vlm(parts)), vlm(parts)
    assert cells(model) == before  # a copy is the same model
    change(model)
    assert not cells(model) & before


def test_settings_of_a_study_count(parts: tuple[Any, Any]) -> None:
    before = cells(vlm(parts))
    half = VLM(copy.deepcopy(parts[0]).to(torch.bfloat16), parts[1], name="small", style="plain",
               template=models_vlm.PLAIN)  # fmt: skip
    others = {
        "dtype": cells(half),
        "batch in half precision": cells(half, batch_size=2),
        "template": cells(vlm(parts, template="Q: <image>{prompt} A:")),
        "prompt style": cells(vlm(parts), prompt_style="llava15"),
        "generation": cells(vlm(parts), generation={"max_new_tokens": 3}),
        "sampling": cells(vlm(parts), generation={"do_sample": True}),
        "seed": cells(vlm(parts), seeds=[1]),
        "task option": cells(vlm(parts), tasks=[{"task": "embedded", "limit": 4, "per_kind": 2}]),
    }
    seen = [before, *others.values()]
    assert len(set.union(*seen)) == sum(map(len, seen))
    for changed in ({"layer": 3}, {"num_keep": 9}):
        method = {"method": "fastv", "num_keep": 8, **changed}
        assert len(cells(vlm(parts), methods=[method]) - before) == 1  # the untouched row stays
    # A longer study goes on with the answers of a shorter one.
    assert cells(vlm(parts), tasks=[{"task": "embedded", "limit": 5}]) == before
    # In single precision a batch answers as its samples do, which other tests prove.
    assert cells(vlm(parts), batch_size=2) == before


def test_sampling_takes_the_model_s_own_temperature_into_the_key(parts: tuple[Any, Any]) -> None:
    sampled = {"generation": {"do_sample": True}}
    model, warm = vlm(parts), vlm(parts)
    warm.model.generation_config.temperature = 0.3
    assert not cells(model, **sampled) & cells(warm, **sampled)
    assert cells(model) == cells(warm)  # greedy search does not read it


def test_an_adapter_s_scale_counts(parts: tuple[Any, Any]) -> None:
    import peft

    def adapted(alpha: int) -> VLM:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(copy.deepcopy(parts[0]), config)
        return VLM(model, parts[1], name="small", style="plain", template=models_vlm.PLAIN)

    assert cells(adapted(4)) == cells(adapted(4))
    assert not cells(adapted(4)) & cells(adapted(8))


def test_pooling_windows_and_transforms_count() -> None:
    def tower(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, **options
        )

    def about(model: nn.Module) -> dict[str, Any]:
        return TimmClassifier(model, name="t").describe()

    pooled = tower()
    pooled.pool_include_prefix = True  # type: ignore[assignment]
    windows = [vit.with_attention(tower(), "neighborhood", kernel_size=size) for size in (2, 3)]
    assert about(tower()) == about(tower())
    assert len({structure_hash(model) for model in (tower(), pooled, *windows)}) == 4
    assert about(tower()) != about(pooled)


def test_an_open_clip_transform_counts_and_its_address_does_not() -> None:
    from torchvision import transforms

    def made(size: int) -> Any:
        def convert(image: Any) -> Any:
            return image

        return transforms.Compose([transforms.Resize(size), convert])

    assert transform_hash(made(8)) == transform_hash(made(8))
    assert transform_hash(made(8)) != transform_hash(made(9))
    assert "transform" in _zero_shot(made(8)).describe()


def _zero_shot(transform: Any) -> ZeroShot:
    model = nn.Module()
    model.visual = nn.Linear(2, 2)
    return ZeroShot(model, transform, torch.eye(2), name="clip")


def test_half_precision_takes_batches(parts: tuple[Any, Any]) -> None:
    """The size of the batch is in the key there, and no option of generate."""
    model = copy.deepcopy(parts[0]).to(torch.bfloat16)
    found = evaluate(model, parts[1], tasks="embedded", methods="todre", budgets=[8], limit=4,
                     controls=["none"], batch_size=2, prompt_style="plain",
                     progress=False)  # fmt: skip
    assert [record.error for record in found.records] == [None] * 8


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (40, 40), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{i}.png", "question": "color?", "answers": "red"} for i in range(4)]
    dump_lines(tmp_path / "x.jsonl", rows)
    return tmp_path


def _ask(parts: tuple[Any, Any], questions: Path) -> None:
    evaluate(*parts, tasks={"task": "folder", "path": str(questions)}, controls=["none"],
             out=questions / "out", prompt_style="plain", progress=False, name="small")  # fmt: skip


def test_pictures_that_changed_are_not_taken_for_those_that_were_asked_about(
    parts: tuple[Any, Any], questions: Path
) -> None:
    _ask(parts, questions)
    _ask(parts, questions)  # nothing changed: nothing to do
    assert len(list(ResultsFolder(questions / "out").lines())) == 4
    Image.new("RGB", (40, 40), (0, 0, 99)).save(questions / "1.png")
    with pytest.raises(ConfigError, match=r"about another picture under the name '1'"):
        _ask(parts, questions)


def test_references_that_changed_are_not_taken_for_those_that_were_scored(
    parts: tuple[Any, Any], questions: Path
) -> None:
    _ask(parts, questions)
    rows = [{"image": f"{i}.png", "question": "color?", "answers": "blue"} for i in range(4)]
    dump_lines(questions / "x.jsonl", rows)
    with pytest.raises(ConfigError, match="the data changed"):
        _ask(parts, questions)


def test_the_identity_is_the_same_in_another_process(parts: tuple[Any, Any]) -> None:
    """Sets and addresses in memory would make every process another model."""
    program = (
        "from tests.eval.test_identity import *\n"
        "print(sorted(cells(vlm(small_embedded()))))\n"
        "print(structure_hash(timm.create_model('vit_tiny_patch16_224', depth=1)))\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    }  # fmt: skip
    assert len(said) == 1
