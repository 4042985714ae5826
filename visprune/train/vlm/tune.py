# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a vision-language model: PEFT's LoRA or all weights, the Trainer, our method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from visprune.catalog import get_method
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, did_you_mean
from visprune.eval.environment import describe
from visprune.eval.models.base import ModelEntry
from visprune.eval.models.load import load_model
from visprune.eval.models.vlm import VLM
from visprune.eval.tasks.base import get_task
from visprune.machine.run import prune
from visprune.machine.saved import save_pretrained
from visprune.machine.written import replace_files
from visprune.train.vlm.learner import prepared, refuse_trained_tower
from visprune.train.vlm.questions import Collator, EncodedQuestions, GroupedQuestions, Questions
from visprune.train.vlm.recipe import VLMRecipe, read
from visprune.train.vlm.scores import score, summary
from visprune.train.vlm.trainer import fit

__all__ = ["train"]


def train(
    raw: Mapping[str, Any], out: str | Path, resume: bool = False, where: str = "the recipe"
) -> dict[str, Any]:
    """Fit a low-rank adapter or the model's own weights, under a method or with all tokens.

    Scored on the same test questions: the model with all tokens, the model under the method, and
    both again after training, so that one sees how much accuracy comes back. ``OUT/weights`` is the
    model (the adapter merged) with its processor, its method and how it was asked
    (:func:`visprune.load_pretrained` and ``visprune eval --model`` read it), ``OUT/adapter`` PEFT's
    folder, ``OUT/trainer`` the Trainer's checkpoints, ``OUT/log.jsonl`` and ``OUT/result.json`` the
    numbers.

    Args:
        raw: Content of the recipe's YAML, overrides applied.
        out: Folder to write into.
        resume: Go on from the Trainer's last checkpoint.
        where: The recipe's file, for messages.

    Returns:
        What ``result.json`` holds.

    Raises:
        ConfigError: The recipe cannot be used, or ``out`` holds checkpoints and ``resume`` is
            false.
    """
    recipe, out = read(raw, where), Path(out)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    last = get_last_checkpoint(str(out / "trainer")) if (out / "trainer").is_dir() else None
    if last and not resume:
        raise ConfigError(f"{out} already holds checkpoints; resume, or choose another folder.")
    method = get_method(recipe.prune.method, **recipe.prune.args) if recipe.prune else None
    questions = Questions(get_task(recipe.train.task, **recipe.train.options))
    get_task(recipe.test.task, **recipe.test.options)  # refused before anything is loaded
    arguments = _arguments(recipe, out)
    vlm = _load(recipe)
    scores = score(vlm, method, recipe.test, batch_size=recipe.score_batch)
    model = prepared(vlm, questions, recipe)
    collator = _collator(model, vlm, questions, recipe)
    with _in_force(model, method):
        trained = fit(model, collator, arguments, out, last)
    if recipe.lora is not None:
        replace_files(out / "adapter", model.save_pretrained)
        model = model.merge_and_unload()
    vlm.model = model.eval()
    after = score(vlm, method, recipe.test, batch_size=recipe.score_batch)
    scores |= {f"{name}_tuned": of for name, of in after.items()}
    asked = {"style": vlm.style, "template": vlm.template}
    with _in_force(vlm.model, method) as run:
        weights = save_pretrained(
            run or vlm.model, out / "weights", processor=vlm.processor, asked=asked
        )
    result = {**summary(scores, recipe), **trained, "weights": str(weights)}
    result |= {"environment": describe(), "recipe": asdict(recipe)}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _load(recipe: VLMRecipe) -> VLM:
    model = load_model(ModelEntry(recipe.model, dtype=recipe.dtype, device=recipe.device))
    if not isinstance(model, VLM):
        raise ConfigError(
            f"{recipe.model!r} answers with classes; {recipe.task} tunes models that talk."
        )
    return model


def _in_force(model: Any, method: PruningMethod | None) -> AbstractContextManager[Any]:
    return nullcontext() if method is None else prune(model, method)


def _collator(model: Any, vlm: VLM, questions: Questions, recipe: VLMRecipe) -> Collator:
    if recipe.questions_per_picture > 1:
        return GroupedQuestions(vlm, questions, recipe.questions_per_picture, recipe.seed)
    if not recipe.encode_once:
        return Collator(vlm, questions)
    refuse_trained_tower(model)
    return EncodedQuestions(vlm, questions)


def _arguments(recipe: VLMRecipe, out: Path) -> TrainingArguments:
    allowed = [f.name for f in fields(TrainingArguments) if f.init]
    for key in recipe.trainer:
        if key not in allowed:
            hint = did_you_mean(key, allowed)
            raise ConfigError(f"trainer: unknown key {key!r}.{hint} See TrainingArguments.")
    given: dict[str, Any] = {
        "report_to": [],
        "logging_steps": 10,
        "disable_tqdm": True,
        "use_cpu": recipe.device == "cpu" or not torch.cuda.is_available(),
        **recipe.trainer,
    }
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), seed=recipe.seed, remove_unused_columns=False, **given
    )
    if recipe.questions_per_picture > 1 and arguments.world_size > 1:
        raise ConfigError(
            "questions_per_picture runs the tower outside of the call that several processes "
            "synchronise; set it to 1, or use one process."
        )
    return arguments
