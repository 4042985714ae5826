# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: one line on the terminal, the same as JSON in ``log.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Progress"]


class Progress:
    """Loss, accuracy, images per second and time left.

    Args:
        path: The log; lines beyond ``step``, left by a run that was killed, are cut off.
        step: Steps done so far.
        last: Steps of the whole run.
        batch: Pictures per step.
        speaks: Whether this process prints and writes.
    """

    def __init__(self, path: Path, step: int, last: int, batch: int, speaks: bool) -> None:
        self.path, self.last, self.batch, self.speaks = path, last, batch, speaks
        self.first, self.begin = step, time.monotonic()
        self.away = 0.0  # seconds spent on validation and checkpoints
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        if speaks:
            self._cut(step)

    def _cut(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that the kill tore
                continue
            last_word = row["event"] == "validation" and row["step"] == self.last  # comes again
            if row["step"] <= step and not last_word:
                kept.append(line + "\n")
        self.path.write_text("".join(kept), encoding="utf-8")

    def add(self, loss: Tensor, hit: Tensor) -> None:
        """Count one step: its mean loss, and the share of pictures that it got right."""
        self.losses.append(loss)
        self.hits.append(hit)

    def line(self, step: int, more: dict[str, Any]) -> None:
        """Report the steps since the last report."""
        spent = time.monotonic() - self.begin - self.away
        speed = (step - self.first) * self.batch / spent
        left = (self.last - step) * self.batch / speed
        row = {
            "event": "train",
            "step": step,
            "loss": round(float(torch.stack(self.losses).mean()), 5),
            "accuracy": round(float(torch.stack(self.hits).mean()), 5),
            **more,
            "images_per_s": round(speed, 1),
            "seconds_left": round(left, 1),
        }
        self.losses.clear()
        self.hits.clear()
        self.write(
            row,
            f"{step}/{self.last} epoch {more['epoch']:.2f} loss {row['loss']:.4f} accuracy "
            f"{row['accuracy']:.3f} | {speed:.1f} images/s, {_clock(left)} left",
        )

    def write(self, row: dict[str, Any], text: str) -> None:
        """Append a line to the log, and print it."""
        if not self.speaks:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
