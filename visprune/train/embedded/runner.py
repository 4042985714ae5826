# SPDX-License-Identifier: Apache-2.0
"""Run a recipe: stage after stage, step after step, resumable."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from visprune.backbones.vlm.embedded import build_processor
from visprune.errors import ConfigError
from visprune.eval.tasks.embedded import words
from visprune.machine.written import replace_files
from visprune.train.checkpoint import load_optimizer, load_weights, read_info, save_checkpoint
from visprune.train.embedded.parts import Parts
from visprune.train.embedded.recipe import EmbeddedRecipe, StageConfig, read_recipe
from visprune.train.embedded.score import score_saved
from visprune.train.embedded.stages import STAGES, Stats, TrainingStage
from visprune.train.parallel import average_gradients, join, rank_and_size


def train(
    config_path: str | Path,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the embedded model by a recipe and save it as an ordinary model folder.

    Each stage writes ``OUT/<stage>.safetensors`` as it goes and the last one that ran
    ``OUT/weights``. A run that was killed goes on with ``resume=True`` and ends with the same
    weights as one that was not (on the same machine and number of threads).

    Args:
        config_path: EmbeddedRecipe, a YAML file.
        out: Folder for checkpoints and weights.
        overrides: Values that replace the recipe's, keys dotted.
        resume: Go on from the checkpoints in ``out``; without, existing ones are an error.

    Returns:
        ``{"weights": folder, "test": accuracy per kind}`` (no ``test`` if the recipe asks none).

    Raises:
        ConfigError: If the recipe is wrong, or ``out`` holds checkpoints and ``resume`` is false.
    """
    recipe, out = read_recipe(config_path, overrides), Path(out)
    names = recipe.only or list(recipe.stages)
    taken = [name for name in names if (out / f"{name}.safetensors").exists()]
    if taken and not resume:
        raise ConfigError(f"{out} already holds checkpoints of {taken}; resume, or choose another.")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    rank, _ = join()
    device = _device(recipe.device)
    parts = Parts(recipe).to(device)
    for name in names:
        _run_stage(name, recipe, parts, device, out)
    folder = out / "weights"
    if rank:
        return {"weights": str(folder)}

    def write(fresh: Path) -> None:
        parts.model.cpu().save_pretrained(fresh)
        build_processor(words()).save_pretrained(fresh)

    replace_files(folder, write)
    result: dict[str, Any] = {"weights": str(folder)}
    if recipe.test_questions:
        result["test"] = score_saved(folder, recipe.test_questions)
        print(json.dumps(result["test"]), flush=True)
    return result


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _run_stage(
    name: str, recipe: EmbeddedRecipe, parts: Parts, device: torch.device, out: Path
) -> None:
    """Bring one stage to its last step, from its checkpoint if there is one."""
    config = recipe.stages[name]
    for source in config.start_from:
        load_weights(out / f"{source}.safetensors", parts)
    seed = recipe.seed * 100 + list(recipe.stages).index(name) + 1
    stage = STAGES[config.kind](parts, config, seed, device)
    trained = stage.trained()
    for parameter_name, parameter in parts.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
    optimizer = _optimizer(stage, trained)
    rank, size = join()
    path, step = out / f"{name}.safetensors", 0
    if path.exists():
        load_weights(path, parts)
        load_optimizer(path, trained, optimizer)
        step = int(read_info(path)["step"])
    log = _Log(name, config, step, out / f"{name}.jsonl")
    while step < config.steps:
        _set_rates(optimizer, config, step)
        with _autocast(recipe, device):
            loss, stats = stage.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(trained.values(), size)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        step += 1
        log.add(loss.detach(), stats)
        if rank:
            continue
        if step % config.validate_every == 0 or step == config.steps:
            with _autocast(recipe, device):
                log.report(step, stage.validate())
        if step % config.save_every == 0 or step == config.steps:
            save_checkpoint(path, trained, optimizer, {"step": step, "stage": name})


def _autocast(recipe: EmbeddedRecipe, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def _optimizer(
    stage: TrainingStage, trained: Mapping[str, torch.nn.Parameter]
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone and one rate per part of the model."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate = next(v for k, v in stage.learning_rates().items() if name.startswith(k))
        decay = stage.config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "peak": r, "lr": r, "weight_decay": d} for (r, d), p in groups.items()],
        betas=(0.9, 0.98),
        fused=True,
    )


def _set_rates(optimizer: torch.optim.AdamW, config: StageConfig, step: int) -> None:
    """Warm up, stay, fall linearly: a plateau lets a stage be lengthened while it runs."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = (config.steps - step) / max(1.0, config.decay * config.steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rise * max(0.01, min(1.0, fall))


class _Log:
    """Progress: one line per validation, on the terminal and as JSON."""

    def __init__(self, name: str, config: StageConfig, step: int, path: Path) -> None:
        self.name, self.config, self.path = name, config, path
        self.first, self.begin = step, time.monotonic()
        self.losses: list[torch.Tensor] = []
        self.right: dict[str, float] = defaultdict(float)
        self.total: dict[str, int] = defaultdict(int)
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, loss: torch.Tensor, stats: Stats) -> None:
        """Count one step."""
        self.losses.append(loss)
        for key, (right, total) in stats.items():
            self.right[key] += right
            self.total[key] += total

    def report(self, step: int, validation: Stats) -> None:
        """Print and store loss, accuracies, speed and time left since the last report."""
        spent = time.monotonic() - self.begin
        speed = (step - self.first) * self.config.batch * rank_and_size()[1] / spent
        left = (self.config.steps - step) * spent / (step - self.first)
        scored = {k: r / n for k, (r, n) in validation.items() if n}
        row = {
            "step": step,
            "loss": float(torch.stack(self.losses).mean()),
            "train": {k: self.right[k] / self.total[k] for k in self.total if self.total[k]},
            "validation": scored,
            "pictures_per_s": speed,
            "seconds_left": left,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        scores = " ".join(f"{k} {v:.3f}" for k, v in scored.items())
        print(
            f"[{self.name}] {step}/{self.config.steps} loss {row['loss']:.3f} | {scores} | "
            f"{speed:.1f} pictures/s, {left / 60:.1f} min left",
            flush=True,
        )
        self.losses.clear()
        self.right.clear()
        self.total.clear()
