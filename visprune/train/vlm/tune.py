# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a pruned vision-language model: PEFT's LoRA, transformers' Trainer, our method."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from visprune.apply import prune
from visprune.catalog import get_method
from visprune.errors import ConfigError, did_you_mean
from visprune.eval.environment import describe
from visprune.eval.models import NONE, ModelSpec, Request, load_model
from visprune.eval.models_vlm import VLM
from visprune.eval.stats import paired_bootstrap
from visprune.eval.tasks.base import get_task
from visprune.method import PruningMethod
from visprune.saved import save_pretrained
from visprune.sharing import EncodedImages
from visprune.train.vlm.questions import Collator, EncodedQuestions, Questions
from visprune.train.vlm.recipe import Recipe, read

__all__ = ["train"]


def train(
    raw: Mapping[str, Any], out: str | Path, resume: bool = False, where: str = "the recipe"
) -> dict[str, Any]:
    """Fit a low-rank adapter to a model under a method, and say how much accuracy comes back.

    Scored on the same test questions: the model with all tokens, the model under the method, and
    both again with the adapter. ``OUT/adapter`` is PEFT's folder, ``OUT/weights`` the merged model
    with its processor and its method (:func:`visprune.load_pretrained` reads it), ``OUT/trainer``
    the Trainer's checkpoints, ``OUT/log.jsonl`` and ``OUT/result.json`` the numbers.

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
    scores = {"dense": _score(vlm, None, recipe)}
    if method is not None:
        scores["pruned"] = _score(vlm, method, recipe)
    adapted = _with_adapter(vlm.model, recipe)
    collator = _collator(adapted, vlm, questions, recipe)
    with _in_force(adapted, method):
        trained = _fit(adapted, collator, arguments, out, last)
    adapted.save_pretrained(out / "adapter")
    vlm.model = adapted.merge_and_unload().eval()
    scores["dense_tuned"] = _score(vlm, None, recipe)
    if method is not None:
        scores["pruned_tuned"] = _score(vlm, method, recipe)
    with _in_force(vlm.model, method) as run:
        save_pretrained(run or vlm.model, out / "weights", processor=vlm.processor)
    result = {**_summary(scores, vlm, recipe), **trained, "weights": str(out / "weights")}
    result |= {"environment": describe(), "recipe": asdict(recipe)}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _load(recipe: Recipe) -> VLM:
    model = load_model(ModelSpec(recipe.model, dtype=recipe.dtype, device=recipe.device))
    if not isinstance(model, VLM):
        raise ConfigError(
            f"{recipe.model!r} answers with classes; vlm_lora tunes models that talk."
        )
    return model


def _in_force(model: Any, method: PruningMethod | None) -> AbstractContextManager[Any]:
    return nullcontext() if method is None else prune(model, method)


def _with_adapter(model: Any, recipe: Recipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("Adapters need `pip install peft`.") from error
    torch.manual_seed(recipe.seed)
    section = recipe.lora
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # no layer of that name
        raise ConfigError(f"lora.target_modules: {error}") from error


# Training ------------------------------------------------------------------------------------


def _collator(model: Any, vlm: VLM, questions: Questions, recipe: Recipe) -> Collator:
    if not recipe.encode_once:
        return Collator(vlm, questions)
    _refuse_trained_tower(model)
    return EncodedQuestions(vlm, questions)


def _fit(
    model: Any, collator: Collator, arguments: TrainingArguments, out: Path, last: str | None
) -> dict[str, Any]:
    """Train the adapter under what is in force."""
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=collator.questions,
        data_collator=collator,
        callbacks=[_Log(out / "log.jsonl", arguments)],
    )
    trainer.remove_callback(PrinterCallback)  # ours says more
    done = trainer.train(resume_from_checkpoint=last)
    return {
        "steps": done.global_step,
        "train_loss": done.training_loss,
        "train_questions": len(collator.questions),
        "train_seconds": round(done.metrics["train_runtime"], 1),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _arguments(recipe: Recipe, out: Path) -> TrainingArguments:
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
    return TrainingArguments(
        output_dir=str(out / "trainer"), seed=recipe.seed, remove_unused_columns=False, **given
    )


def _refuse_trained_tower(model: Any) -> None:
    """Pictures that were encoded before training would not follow a tower that changes."""
    vision = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "language_model" not in name and "lm_head" not in name
    ]
    if vision:
        raise ConfigError(
            f"encode_once: the adapter changes {vision[0]}, so pictures cannot be encoded once. "
            f"Set encode_once to false, or lora.target_modules to the decoder's layers."
        )


class _Trainer(Trainer):
    """The Trainer; a batch that names encoded pictures gets them here.

    They carry signals for methods as attributes of tensors, which Accelerate's copies of a batch
    would lose.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer``."""
        pictures = inputs.pop("pictures", None)
        if pictures is not None:
            collator: Any = self.data_collator
            chosen = EncodedImages(collator.features).select(pictures.tolist())
            inputs["mm_encoder_outputs"] = chosen
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Log(TrainerCallback):
    """Loss, questions per second and time left, on the terminal and as JSON."""

    def __init__(self, path: Path, arguments: TrainingArguments) -> None:
        self.path, self.begin, self.first = path, time.monotonic(), 0
        self.batch = (
            arguments.per_device_train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.begin, self.first = time.monotonic(), state.global_step
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write a line."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        spent = time.monotonic() - self.begin
        speed = (state.global_step - self.first) * self.batch / spent
        left = (state.max_steps - state.global_step) * self.batch / speed
        row = {"step": state.global_step, "loss": logs["loss"], "lr": logs.get("learning_rate")}
        row |= {"questions_per_s": round(speed, 2), "seconds_left": round(left, 1)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{state.global_step}/{state.max_steps} loss {float(logs['loss']):.4f} | "
            f"{speed:.1f} questions/s, {left / 60:.1f} min left",
            flush=True,
        )


# Scores --------------------------------------------------------------------------------------


def _score(vlm: VLM, method: PruningMethod | None, recipe: Recipe) -> list[float]:
    """Score of every test question, in order."""
    task = get_task(recipe.test.task, **recipe.test.options)
    samples, scores = task.samples(), []
    vlm.model.eval()
    generation = vlm.generation(task, {})
    with vlm.answering(method or NONE, task, vlm.style, generation) as answer:
        for start in range(0, len(samples), recipe.score_batch):
            part = [samples[i] for i in range(start, min(start + recipe.score_batch, len(samples)))]
            requests = [Request(s, task.prompt(s, vlm.style), s.image()) for s in part]
            for sample, output in zip(part, answer(requests), strict=True):
                scores.append(task.score(sample, task.parse(output.text, sample)))
    mean = 100 * sum(scores) / len(scores)
    print(f"{method or 'all tokens'}: {mean:.1f} over {len(scores)} questions", flush=True)
    return scores


def _summary(scores: dict[str, list[float]], vlm: VLM, recipe: Recipe) -> dict[str, Any]:
    """Means, the share of the loss that came back, and its paired intervals."""
    means = {name: 100 * sum(values) / len(values) for name, values in scores.items()}
    result: dict[str, Any] = {"score": means, "test_questions": len(scores["dense"])}
    if "pruned" not in scores:
        return result
    task = get_task(recipe.test.task, **recipe.test.options)
    clusters = [sample.cluster or sample.id for sample in task.samples()]
    gain = paired_bootstrap(scores["pruned_tuned"], scores["pruned"], clusters)
    result["gain"] = {k: 100 * v for k, v in asdict(gain).items()}
    gap = paired_bootstrap(scores["pruned_tuned"], scores["dense"], clusters)
    result["left_to_dense"] = {k: 100 * v for k, v in asdict(gap).items()}
    lost = means["dense"] - means["pruned"]
    result["lost"] = lost
    result["recovered_share"] = (
        (means["pruned_tuned"] - means["pruned"]) / lost if lost > 0 else None
    )
    return result
