# SPDX-License-Identifier: Apache-2.0
"""A tiny data set and a tiny recipe: three classes, told apart by colour and stripes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file

from visprune.train.image import train

CLASSES = ("blue", "green", "red")
SIDE = 16


def picture(label: int, number: int) -> Image.Image:
    """A picture of a class: its colour, stripes, noise."""
    rng = np.random.default_rng([label, number])
    pixels = rng.integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:, :, 2 - label] += 100
    pixels[:: label + 2] //= 2
    return Image.fromarray(pixels)


def make_folder(root: Path, train: int = 16, val: int = 6) -> Path:
    """Write an ImageFolder with parts ``train`` and ``val``; so many pictures of each class."""
    for part, count, first in (("train", train, 0), ("val", val, 1000)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(label, first + i).save(root / part / name / f"{i:03}.png")
    return root


def recipe(data: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a few seconds; ``changes`` are dotted with ``__``."""
    raw: dict[str, Any] = {
        "task": "image_classification",
        "device": "cpu",
        "batch": 8,
        "save_every": 2,
        "log_every": 1,
        "data": {"path": str(data)},
        "model": {
            "name": "vit_tiny_patch16_224",
            "args": {
                "img_size": SIDE,
                "patch_size": 4,
                "embed_dim": 16,
                "depth": 4,
                "num_heads": 2,
                "drop_path_rate": 0.1,
            },
        },
        "augment": {"mixup": 0.2, "cutmix": 0.5, "smoothing": 0.1, "transform": {"re_prob": 0.3}},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"epochs": 1, "warmup_epochs": 0.2},
    }
    for key, value in changes.items():
        *way, last = key.split("__")
        place = raw
        for part in way:
            place = place.setdefault(part, {})
        place[last] = value
    return raw


def run(raw: dict[str, Any], out: Path, resume: bool = False) -> dict[str, Any]:
    """Train; Accelerate's state is of one process, and forgotten between runs."""
    PartialState._reset_state()
    return train(raw, out, resume)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weights" / "model.safetensors")


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def in_children(work: Callable[..., None], *args: Any, count: int = 1) -> list[int | None]:
    """Run ``work(rank, *args)`` in forked processes and return how each ended.

    Forked: a spawned process would import the test file by a name that only pytest knows.
    """
    context = torch.multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(rank, *args)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]
