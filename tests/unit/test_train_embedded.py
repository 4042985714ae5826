# SPDX-License-Identifier: Apache-2.0
"""The recipe runner, at toy size: stages run, a killed run resumes to the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import distributed
from transformers import LlavaForConditionalGeneration

from visprune.backbones.vlm import embedded
from visprune.backbones.vlm.embedded import PROMPT, build_processor
from visprune.errors import ConfigError
from visprune.eval.tasks.embedded import load, make_sample, words
from visprune.train import train
from visprune.train.__main__ import main
from visprune.train.embedded.data import (
    TOKENS,
    VOCABULARY,
    choose_patches,
    encode_questions,
    patch_labels,
    to_pixels,
)
from visprune.train.embedded.parts import Parts, answer_logits
from visprune.train.embedded.recipe import STAGE_KINDS, EmbeddedRecipe, StageConfig, read_recipe
from visprune.train.embedded.score import score_saved
from visprune.train.embedded.stages import STAGES, DenseStage
from visprune.train.parallel import average_gradients

CONFIG = Path(__file__).parents[2] / "configs" / "train" / "embedded.yaml"
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
COMMON = {"steps": 5, "batch": 2, "per_kind": 1, "warmup": 2, "save_every": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """All four kinds of stage at toy size."""
    every = {**COMMON, "validate_every": 4, "validate_pictures": 2}
    stages = {
        "decoder": {**every, "kind": "oracle", "patches": 24, "drop": 0.5},
        "tower": {**every, "kind": "dense", "side": 96, "objects": [2, 4]},
        "align": {**every, "kind": "align", "side": 96, "start_from": ["decoder", "tower"]},
        "joint": {**every, "kind": "joint", "patches": 40, "start_from": ["align"]},
    }
    content = {"vision": TINY, "text": TINY, "threads": 1, "test_questions": 0, "stages": stages}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**content, "precision": "fp32"}, sort_keys=False))
    return path


def checkpoints(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in sorted(out.glob("*.safetensors"))}


def test_killed_run_resumes_to_the_same_weights(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe, tmp_path / "whole")

    plain = DenseStage.loss

    def killed(self: DenseStage, step: int) -> Any:
        if step == 3:  # after the checkpoint of step 2, in the second stage
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(DenseStage, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut")
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "joint.safetensors").exists()
    train(recipe, tmp_path / "cut", resume=True)

    whole, cut = checkpoints(tmp_path / "whole"), checkpoints(tmp_path / "cut")
    assert list(whole) == list(cut) == ["align", "decoder", "joint", "tower"]
    for stage, tensors in whole.items():
        assert tensors.keys() == cut[stage].keys()
        assert all(torch.equal(value, cut[stage][key]) for key, value in tensors.items()), stage
    saved = [load_file(tmp_path / n / "weights" / "model.safetensors") for n in ("whole", "cut")]
    assert all(torch.equal(value, saved[1][key]) for key, value in saved[0].items())


def test_training_changes_only_what_the_stage_trains(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "out", {"only": ["tower"]})
    before = dict(Parts(read_recipe(recipe)).model.named_parameters())
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "weights")
    after = dict(saved.named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("vision_tower" in name for name in changed)
    assert not any("language_model" in name or "projector" in name for name in changed)


def test_loss_falls_on_the_oracle_stage(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "out", {"only": ["decoder"], "decoder.steps": 40, "decoder.lr": 3e-3})
    rows = [json.loads(line) for line in (tmp_path / "out" / "decoder.jsonl").open()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert {"existence", "read", "all"} <= rows[-1]["validation"].keys()


def test_many_questions_at_once_equal_single_prompts() -> None:
    """The block mask and positions of training give what a user's prompt of one question gives."""
    parts = Parts(EmbeddedRecipe(stages={}, vision=TINY, text=TINY, attention="eager")).eval()
    pictures = [make_sample("train", i) for i in (0, 1)]
    questions = encode_questions(pictures)
    with torch.no_grad():
        features, _ = parts.see(to_pixels([p.pixels for p in pictures]))
        visual = parts.model.model.multi_modal_projector(features)
        index = torch.arange(TOKENS).expand(2, -1)
        together = answer_logits(parts.model, visual, index, questions)
        parts.model.set_attn_implementation("sdpa")
        processor = build_processor(words())
        for row, picture in enumerate(pictures):
            prompts = [PROMPT.format(question=q.text) for q in picture.questions]
            images = [picture.image] * len(prompts)
            inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
            single = parts.model(**inputs).logits[:, -1]
            mine = together[row][questions.kind[row] >= 0]
            assert len(mine) == len(prompts) > 4
            torch.testing.assert_close(mine, single, atol=2e-5, rtol=0)


def test_a_window_sees_its_own_places() -> None:
    """A picture fed as a window that covers the whole grid gives what the plain tower gives."""
    parts = Parts(EmbeddedRecipe(stages={}, vision=TINY, text=TINY)).eval()
    picture = make_sample("train", 2)
    labels = patch_labels(picture.patch_owner[None], [picture.objects])
    pixels = to_pixels([picture.pixels])
    with torch.no_grad():
        window, cls = parts.see(pixels, labels)
        plain = parts.model.model.vision_tower(pixels, output_hidden_states=True)
    torch.testing.assert_close(window, plain.hidden_states[-2][:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(cls, plain.pooler_output, atol=1e-5, rtol=0)


def test_frozen_tables_stay(recipe: Path) -> None:
    parts = Parts(read_recipe(recipe))
    stage = STAGES["oracle"](parts, StageConfig("oracle", tables=False), 1, torch.device("cpu"))
    names = stage.trained()
    assert any("layers.0.self_attn" in name for name in names)
    assert not any("embed_tokens" in name or name.startswith("oracle.") for name in names)


def test_signposts_point_along_the_words() -> None:
    parts = Parts(EmbeddedRecipe(stages={}, vision=TINY, text=TINY))
    table = parts.model.get_input_embeddings().weight.detach()
    before = parts.oracle.row.weight.detach().clone(), parts.oracle.col.weight.detach().clone()
    parts.oracle.add_signposts(1.0, table)
    down = parts.oracle.row.weight.detach() - before[0]
    across = parts.oracle.col.weight.detach() - before[1]
    for change, plus, minus in ((down, "below", "above"), (across, "right", "left")):
        along = change @ (table[VOCABULARY.index(plus)] - table[VOCABULARY.index(minus)])
        assert along[-1] > 0 > along[0]
        torch.testing.assert_close(change[-1], -change[0])


def test_choose_patches_prefers_objects() -> None:
    owners = np.stack([make_sample("train", i, draw=False).patch_owner for i in range(4)])
    chosen = choose_patches(np.random.default_rng(0), owners, 200, drop=0.0)
    for owner, index in zip(owners.reshape(4, -1), chosen.numpy(), strict=True):
        assert (np.diff(index) > 0).all()
        assert set(np.flatnonzero(owner >= 0)) <= set(index)
    everything = choose_patches(np.random.default_rng(0), owners, TOKENS, drop=0.9)
    assert (everything == torch.arange(TOKENS)).all()


def test_validation_asks_pictures_of_the_validation_split(recipe: Path) -> None:
    parts = Parts(read_recipe(recipe))
    stage = STAGES["oracle"](parts, StageConfig("oracle", batch=3), 1, torch.device("cpu"))
    assert [p.id for p in stage.pictures(1_000_000_000)] == [f"validation/{i}" for i in range(3)]
    assert all(p.id.startswith("train/") for p in stage.pictures(7))


def _one_of_two(rank: int, folder: str) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    weights[0].grad = torch.full((2, 3), float(rank))
    weights[1].grad = torch.arange(4.0) * (1 + 2 * rank)
    average_gradients(weights, 2)
    torch.testing.assert_close(weights[0].grad, torch.full((2, 3), 0.5))
    torch.testing.assert_close(weights[1].grad, torch.arange(4.0) * 2)
    Path(folder, f"done{rank}").touch()
    distributed.destroy_process_group()


def test_processes_average_their_gradients(tmp_path: Path) -> None:
    # "fork": a spawned process would import this file by a name that only pytest knows.
    torch.multiprocessing.start_processes(
        _one_of_two, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()


def test_processes_see_different_pictures(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StageConfig("oracle", batch=3)
    stage = STAGES["oracle"](Parts(read_recipe(recipe)), config, 1, torch.device("cpu"))
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        seen += [picture.id for step in range(3) for picture in stage.pictures(step)]
    assert len(set(seen)) == 18


def test_shipped_recipe_is_valid_and_fits_the_vocabulary() -> None:
    recipe = read_recipe(CONFIG)
    assert {s.kind for s in recipe.stages.values()} == set(STAGE_KINDS)
    assert len(VOCABULARY) == len(set(VOCABULARY))


def test_existing_checkpoints_are_not_overwritten(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "out", {"only": ["decoder"], "decoder.steps": 1})
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        train(recipe, tmp_path / "out", {"only": ["decoder"]})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decoder.stepz": 3}, "Did you mean 'steps'"),
        ({"decodre.steps": 3}, "Did you mean 'decoder'"),
        ({"tower.kind": "dens"}, "Did you mean 'dense'"),
        ({"only": ["towre"]}, "Did you mean 'tower'"),
        ({"precision": "fp8"}, "allowed: fp32, bf16"),
        ({"joint.start_from": ["later"]}, "no earlier stage"),
        ({"align.steps": 0}, "at least 1"),
    ],
)
def test_wrong_recipes_are_refused(
    recipe: Path, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe, overrides)


def test_command_line_reports_a_missing_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.yaml"), "--out", str(tmp_path)]) == 2
    assert "There is no recipe" in capsys.readouterr().err


def test_command_line_trains_with_overrides(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(recipe), "--out", str(out), "only=[decoder]", "decoder.steps=1"]) == 0
    assert (out / "weights" / "model.safetensors").is_file()


def test_a_saved_model_is_scored_as_it_answers_one_by_one(tmp_path: Path) -> None:
    model, processor = embedded.load()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    right: dict[str, list[bool]] = {}
    for picture in load("validation", 14):
        for question in picture.questions:
            text = PROMPT.format(question=question.text)
            inputs = processor(images=[picture.image], text=[text], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], True).strip()
            for key in (question.kind, "all"):
                right.setdefault(key, []).append(said == question.answer)
    assert len(right["all"]) == 14
    assert 0 < sum(right["all"]) < 14  # so that a mix-up would show
    scored = score_saved(tmp_path, 14, "validation")
    assert scored == {key: sum(found) / len(found) for key, found in right.items()}
