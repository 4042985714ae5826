# SPDX-License-Identifier: Apache-2.0
"""The training loop: every step is a function of the recipe and the state before it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from visprune.errors import ConfigError
from visprune.eval.environment import describe
from visprune.train.checkpoint import read_info
from visprune.train.image.batches import Batch, ImageData
from visprune.train.image.mixing import Mixer, check_micro_batch
from visprune.train.image.optimizer import build_optimizer, scale_rate, take_step
from visprune.train.image.progress import Progress
from visprune.train.image.reading import build_recipe, recipe_dict
from visprune.train.image.recipe import FREE_ON_RESUME, ImageRecipe
from visprune.train.image.schedule import build_schedule
from visprune.train.image.seeds import seed_of
from visprune.train.image.state import load_state, save_state
from visprune.train.image.student import Student
from visprune.train.parallel import average_gradients
from visprune.train.sections import build_section, changed_keys

__all__ = ["train"]


def train(
    raw: Mapping[str, Any], out: str | Path, resume: bool = False, where: str = "the recipe"
) -> dict[str, Any]:
    """Train an image classifier.

    ``OUT/checkpoint.safetensors`` is replaced as the run goes, ``OUT/log.jsonl`` grows, and at the
    end there are ``OUT/weights`` (timm's Hub layout, with the method beside it) and
    ``OUT/result.json``. A run that was killed at any step goes on with ``resume=True`` and ends
    with the same weights as one that was not (on the same machine and number of threads).

    Args:
        raw: Content of the recipe's YAML, overrides applied.
        out: Folder to write into.
        resume: Go on from the checkpoint in ``out``; without, an existing one is an error.
        where: The recipe's file, for messages.

    Returns:
        What ``result.json`` holds.

    Raises:
        ConfigError: The recipe or the data cannot be used, ``out`` is taken, or a checkpoint cannot
            be written.
    """
    recipe = build_recipe(raw, where)
    _check_device(recipe.device)
    out = Path(out)
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists() and not resume:
        raise ConfigError(f"{out} already holds a checkpoint; resume, or choose another folder.")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    return _Run(recipe, out, checkpoint).go()


def _check_device(name: str) -> None:
    """Refuse a device that torch does not know or that is not here."""
    if name == "auto":
        return
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(
            f"device is {name!r}; allowed: auto, cpu, cuda, or another device of torch."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {name!r}, and torch finds no CUDA GPU here. Allowed: auto (a GPU if there "
            f"is one), cpu."
        )


class _Run:
    """One run of a recipe in one process."""

    def __init__(self, recipe: ImageRecipe, out: Path, checkpoint: Path) -> None:
        self.recipe, self.out, self.checkpoint = recipe, out, checkpoint
        self.processes = PartialState(cpu=recipe.device == "cpu" or not torch.cuda.is_available())
        self.rank, self.world = self.processes.process_index, self.processes.num_processes
        every = recipe.device in ("auto", "cuda")  # each process has a GPU of its own
        self.device = self.processes.device if every else torch.device(recipe.device)
        self.micro = check_micro_batch(recipe, self.world)
        self.student = Student(recipe, self.device)
        self.data: ImageData = self.student.data
        self.mixer = Mixer(recipe.augment, len(self.data.classes), recipe.seed)
        self.last = round(recipe.schedule.epochs * self.data.steps_per_epoch)
        self.optimizer = build_optimizer(recipe.optimizer, self.student.model)
        if recipe.prune is not None and recipe.prune.model_lr_scale != 1:
            scale_rate(self.optimizer, recipe.prune.model_lr_scale, but=self.student.predictors())
        self.schedule = build_schedule(recipe.schedule, self.optimizer, self.data.steps_per_epoch)
        self.step = 0
        self.broken: set[str] = set()
        changed = self._restore() if checkpoint.exists() else {}
        main = self.processes.is_main_process
        self.progress = Progress(out / "log.jsonl", self.step, self.last, recipe.batch, main)
        if changed:
            row = {"event": "resumed", "step": self.step, "changed": changed}
            self.progress.write(row, f"resumed at step {self.step} with other {', '.join(changed)}")

    def _restore(self) -> dict[str, Any]:
        """Take up the checkpoint; return what of the recipe changed since, old and new value."""
        saved = read_info(self.checkpoint)["recipe"]
        # A checkpoint of an earlier version lacks newer keys: it ran as their defaults do.
        old = recipe_dict(build_section(type(self.recipe), saved, str(self.checkpoint)))
        new = recipe_dict(self.recipe)
        changed = changed_keys(old, new)
        wrong = [key for key in changed if key not in FREE_ON_RESUME]
        if wrong:
            raise ConfigError(
                f"{self.checkpoint} belongs to a run with other {', '.join(wrong)}. Resume it with "
                f"its own recipe, or begin a new run from its weights (model.start_from)."
            )
        parts, info = load_state(self.checkpoint, self.optimizer)
        self.student.load(parts)
        self.step = int(info["step"])
        return {key: [_at(old, key), _at(new, key)] for key in changed}

    def go(self) -> dict[str, Any]:
        """Train to the last step, validate, save."""
        begin = time.monotonic()
        started_at = self.step
        loader = iter(
            self.data.train_loader(self.step, self.last, self.micro, self.rank, self.world)
        )
        scored: dict[str, Any] = {}
        while self.step < self.last:
            self._one_step(loader)
            if self.step % self.recipe.log_every == 0 or self.step == self.last:
                self.progress.line(self.step, self._more())
            away = time.monotonic()
            if self._validation_due():
                scored = self._validate()
            if self.step % self.recipe.save_every == 0 or self.step == self.last:
                self._save()
            self.progress.away += time.monotonic() - away
        return self._finish(scored, time.monotonic() - begin, started_at)

    def _one_step(self, loader: Any) -> None:
        """Forward and backward of this process's micro-batches, then one update."""
        recipe, count = self.recipe, self.recipe.batch // self.micro
        self.schedule.step_update(self.step)
        self.student.set_epoch(self.step / self.data.steps_per_epoch)
        if self.student.fixed_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.student.fixed_rate * group.get("lr_scale", 1.0)
        loss_sum, hit_sum = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for number in range(self.rank, count, self.world):
            batch = self._report(next(loader))
            torch.manual_seed(seed_of(recipe.seed, self.step, number))
            images, labels = batch.images.to(self.device), batch.labels.to(self.device)
            images, target = self.mixer(images, labels, self.step)
            with self._autocast():
                logits, loss = self.student.loss(images, target)
            # Divided so that the mean over processes, below, is the mean over the whole batch.
            (loss * (self.world / count)).backward()
            loss_sum += loss.detach() / count
            hit_sum += (logits.argmax(-1) == target.argmax(-1)).float().mean() / count
        parameters = self.student.parameters()
        average_gradients(parameters, self.world)
        if recipe.optimizer.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip_grad)
        take_step(self.optimizer, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.student.after_step(self.step)
        self.progress.add(self._sum(loss_sum), self._sum(hit_sum))

    def _report(self, batch: Batch) -> Batch:
        """Name pictures that could not be read, each once."""
        for name in batch.broken:
            if name not in self.broken:
                self.broken.add(name)
                self.progress.write(
                    {"event": "skipped", "step": self.step, "picture": name}, f"skipped: {name}"
                )
        return batch

    def _sum(self, value: Tensor) -> Tensor:
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def _autocast(self) -> AbstractContextManager[Any]:
        on = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def _more(self) -> dict[str, Any]:
        return {
            "epoch": round(self.step / self.data.steps_per_epoch, 4),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            **self.student.state_line(),
        }

    def _validation_due(self) -> bool:
        every = self.recipe.validate_every * self.data.steps_per_epoch
        return self.step % every == 0 or self.step == self.last

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Accuracy on the validation pictures, of the moving average too where there is one."""
        row: dict[str, Any] = {"event": "validation", "step": self.step}
        row["epoch"] = round(self.step / self.data.steps_per_epoch, 4)
        for name, model in self.student.evaluated():
            counts = torch.zeros(3, dtype=torch.float64, device=self.device)
            loader = self.data.val_loader(self.micro, self.rank, self.world)
            for batch in map(self._report, loader):
                if not len(batch.labels):
                    continue
                with self._autocast():
                    logits = model(batch.images.to(self.device)).float()
                labels = batch.labels.to(self.device)
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                right = (logits.argmax(-1) == labels).sum()
                counts += torch.stack(
                    [right.double(), loss.double(), counts.new_tensor(len(labels))]
                )
            right, loss, total = self._sum(counts).tolist()
            if not total:
                self._save()  # what was learned up to here
                raise ConfigError(
                    f"Not one validation picture of {self.data.val.pictures.where} can be read."
                )
            row[name] = {"accuracy": right / total, "loss": loss / total, "pictures": int(total)}
        text = ", ".join(
            f"{k} accuracy {v['accuracy']:.4f}" for k, v in row.items() if isinstance(v, dict)
        )
        self.progress.write(row, f"validation after epoch {row['epoch']:.2f}: {text}")
        return row

    def _save(self) -> None:
        if self.processes.is_main_process:
            info = {"step": self.step, "recipe": recipe_dict(self.recipe)}
            save_state(self.checkpoint, self.student.state(), self.optimizer, info)
        self.processes.wait_for_everyone()

    def _finish(self, scored: dict[str, Any], seconds: float, started_at: int) -> dict[str, Any]:
        if not scored:  # resumed after the last step
            scored = self._validate()
        if self.processes.is_main_process:
            self.student.save(self.out / "weights")
        result = {
            "validation": {k: v for k, v in scored.items() if isinstance(v, dict)},
            "weights": str(self.out / "weights"),
            "macs": self.student.macs(),
            "parameters": sum(p.numel() for p in self.student.model.parameters()),
            "steps": self.last,
            "epochs": self.recipe.schedule.epochs,
            "train_pictures": len(self.data.train),
            "skipped_pictures": sorted(self.broken),
            "seconds": round(seconds, 1),
            "resumed_at": started_at,
            "processes": self.world,
            "environment": describe(),
            "recipe": recipe_dict(self.recipe),
        }
        if self.processes.is_main_process:
            text = json.dumps(result, indent=1) + "\n"
            (self.out / "result.json").write_text(text, encoding="utf-8")
        self.processes.wait_for_everyone()
        return result


def _at(recipe: Mapping[str, Any], key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[part]
    return value
