# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer on questions about pictures that are encoded once, or once per batch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from visprune.eval.environment import quiet_loading
from visprune.machine.sharing import EncodedImages, encode_images
from visprune.train.vlm.questions import Collator

__all__ = ["Log", "fit"]


def fit(
    model: Any, collator: Collator, arguments: TrainingArguments, out: Path, last: str | None
) -> dict[str, Any]:
    """Train what of the model may learn, under what is in force.

    Args:
        model: The model, a method in force on it or not.
        collator: Its questions as batches.
        arguments: Of the Trainer.
        out: Folder of ``log.jsonl``.
        last: Checkpoint to go on from.

    Returns:
        Numbers for ``result.json``.
    """
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=collator.dataset,
        data_collator=collator,
        callbacks=[Log(out / "log.jsonl", arguments, collator.questions_per_item)],
    )
    trainer.remove_callback(PrinterCallback)  # ours says more
    if last is not None and isinstance(model, PreTrainedModel):
        trainer.add_callback(_Restore(last))
    done = trainer.train(resume_from_checkpoint=last)
    return {
        "steps": done.global_step,
        "train_loss": done.training_loss,
        "train_questions": len(collator.questions),
        "train_seconds": round(done.metrics["train_runtime"], 1),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


class _Trainer(Trainer):
    """The Trainer; a batch that names encoded pictures gets them here.

    They carry signals for methods as attributes of tensors, which Accelerate's copies of a batch
    would lose.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer``."""
        pictures, pixels = inputs.pop("pictures", None), inputs.pop("pixels", None)
        if pictures is not None:
            collator: Any = self.data_collator
            encoded = (
                EncodedImages(collator.features)
                if pixels is None
                else encode_images(model, grad=True, **pixels)
            )
            inputs["mm_encoder_outputs"] = encoded.select(pictures.tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Restore(TrainerCallback):
    """Take up a checkpoint's weights by the names that the model has in memory.

    A checkpoint holds a vision-language model under the names of its published files. The Trainer
    (transformers 5.24) looks those up in the model as it is, finds none, and goes on from the
    weights of the beginning, without an error.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load all of them, in place."""
        model: Any = kwargs["model"]
        with quiet_loading():
            saved = type(model).from_pretrained(
                self.folder, dtype=model.dtype, local_files_only=True
            )
        model.load_state_dict(saved.state_dict())


class Log(TrainerCallback):
    """Loss, questions per second and time left, on the terminal and as JSON.

    Args:
        path: The log.
        arguments: Of the Trainer.
        questions: Questions per item of the data set, on average.
    """

    def __init__(self, path: Path, arguments: TrainingArguments, questions: float = 1.0) -> None:
        self.path, self.begin, self.first = path, time.monotonic(), 0
        self.batch = questions * (
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
