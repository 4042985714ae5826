# SPDX-License-Identifier: Apache-2.0
"""A results folder made by code: methods at budgets on two tasks, drawn pictures, no model."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visprune.eval.records.folder import ResultsFolder, write_json
from visprune.eval.records.record import Cell, Record
from visprune.eval.tasks.embedded import KINDS, make_sample

MODEL = {"name": "made-7b", "weights": "0" * 16, "dtype": "float32", "attention": "sdpa"}
GRID = 24
LAYERS_TOKENS = GRID * GRID
# How much of the answers a method loses as its budget shrinks, for the made numbers.
METHODS = {"random": 0.34, "pool": 0.40, "todre": 0.10, "fastv": 0.30, "visionzip": 0.16}
CONTROLS = ("random", "pool")
BUDGETS = (192, 128, 64, 32)
EMBEDDED = {"task": "embedded", "version": 1}
YES_NO = {"task": "there", "version": 1}


def made_results(
    path: Path,
    *,
    pictures: int = 24,
    methods: Sequence[str] = tuple(METHODS),
    budgets: Sequence[int] = BUDGETS,
    seeds: Sequence[int] = (0,),
    speed: bool = True,
) -> ResultsFolder:
    """Write a folder as `visprune eval` leaves it, and return it."""
    folder = ResultsFolder(path, create=True)
    env = folder.add_environment(
        {
            "command": "visprune eval made.yaml --out made",
            "date": "2026-11-23T10:00:00+00:00",
            "cpu": "Made CPU",
            "cores": 2,
            "threads": 2,
            "gpu": None,
            "platform": "Linux x86_64",
            "versions": {"python": "3.11", "torch": "2.15.0", "transformers": "5.23.0"},
        }
    )
    shown = [make_sample("test", number) for number in range(pictures)]
    names = [
        folder.add_picture(p.image, hashlib.sha256(p.pixels.tobytes()).hexdigest()) for p in shown
    ]
    cells = [
        _cell(task, method, keep, seed)
        for task in (EMBEDDED, YES_NO)
        for seed in seeds
        for method, keep in [("none", None), *((m, k) for m in methods for k in budgets)]
    ]
    folder.add_cells(cells)
    write_json(folder.path / "study.json", {"name": "Made study", "cells": [c.id for c in cells]})
    with folder.writer() as writer:
        for cell in cells:
            writer.write(_records(cell, shown, names, env))
            if speed:
                folder.add_speed(cell.id, _speed(cell, env))
    return folder


def _cell(task: dict[str, Any], method: str, keep: int | None, seed: int) -> Cell:
    about: dict[str, Any] = {"method": method} if keep is None else {
        "method": method, "num_keep": keep, "keep_ratio": None, "strict": False,
    }  # fmt: skip
    if method == "random":
        about["seed"] = seed
    return Cell(
        model=MODEL, method=about, task=task, prompt_style="plain", generation={"do_sample": False},
        seed=seed, label="untouched" if keep is None else f"{method} {keep}", num_keep=keep,
        control=method in CONTROLS,
    )  # fmt: skip


def _cost(keep: int | None) -> dict[str, int]:
    tokens = keep or LAYERS_TOKENS
    return {
        "vision": 1_000_000_000,
        "projector": 20_000_000,
        "selection": 0 if keep is None else 40_000_000,
        "prefill": 2_500_000 * (tokens + 20),
        "decode": 5_000_000,
        "lm_head": 700_000,
    }


def _speed(cell: Cell, env: str) -> dict[str, Any]:
    tokens = cell.num_keep or LAYERS_TOKENS
    parts = {
        "vision_ms": 18.0,
        "selection_ms": 0.0 if cell.num_keep is None else 2.5,
        "prefill_ms": 24.0 + 0.07 * tokens,
        "decode_ms_per_token": 1.2 + 0.001 * tokens,
        "total_ms": 28.0 + 0.075 * tokens,
    }
    batch = {
        size: {
            name: {"median": scale * ms, "q1": scale * ms * 0.97, "q3": scale * ms * 1.05}
            for name, ms in parts.items()
        }
        for size, scale in (("1", 1.0), ("4", 3.1))
    }
    return {
        "rounds": 9, "batch": batch, "kv_bytes": 8192 * tokens, "peak_bytes": None,
        "attention": "sdpa", "threads": 2, "device": "cpu", "env": env,
    }  # fmt: skip


def _records(cell: Cell, shown: Sequence[Any], names: Sequence[str], env: str) -> list[Record]:
    made = []
    for picture, name in zip(shown, names, strict=True):
        for question in picture.questions:
            luck = np.random.default_rng(int(_digest(question.id, cell.task["task"])[:12], 16))
            noise = np.random.default_rng(
                int(_digest(question.id, cell.label, cell.seed, cell.task["task"])[:12], 16)
            )
            made.append(_record(cell, picture, question, name, env, luck, noise))
    return made


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _record(
    cell: Cell, picture: Any, question: Any, name: str, env: str,
    luck: np.random.Generator, noise: np.random.Generator,
) -> Record:  # fmt: skip
    tokens = cell.num_keep or LAYERS_TOKENS
    loss = METHODS.get(str(cell.method["method"]), 0.0) * (1 - tokens / LAYERS_TOKENS) ** 2
    loss *= 1.0 + KINDS.index(question.kind) / len(KINDS)
    yes_no = cell.task["task"] == "there"
    right = question.answer if not yes_no else ("yes" if luck.random() < 0.5 else "no")
    draw = luck.random()
    fate = noise.random()
    wrong = "no" if right == "yes" else "yes" if yes_no else "zebra"
    answer: str | None = right if draw < 0.93 - loss - 0.03 * noise.random() else wrong
    error = {"type": "SampleError", "message": "cut short"} if fate > 0.996 else None
    if 0.98 < fate <= 0.996:
        answer = None
    text = None if error else f"{answer}." if answer else "the the the the"
    macs = _cost(cell.num_keep)
    return Record(
        cell=cell.id, sample=question.id, key=_digest(cell.id, question.id), kind=question.kind,
        cluster=picture.id, question=f"Is it {right}?" if yes_no else question.text,
        prompt=f"{question.text}\nAnswer with one word.", answers=[right],
        text=text, answer=None if error else answer, rule="" if answer is None else "word",
        score=None if error else float(answer == right), error=error,
        tokens=None if error else float(tokens), macs=None if error else macs,
        kv_bytes=8192 * tokens, new_tokens=2, picture=name, kept=_kept(cell, picture, noise),
        seconds=0.05, env=env,
    )  # fmt: skip


def _kept(cell: Cell, picture: Any, noise: np.random.Generator) -> dict[str, Any] | None:
    if cell.num_keep is None:
        return None
    liking = noise.random((GRID, GRID))
    if cell.method["method"] != "random":
        liking = liking + 1.5 * (picture.patch_owner >= 0)
    order = np.argsort(-liking.reshape(-1), kind="stable")
    bits = np.zeros(GRID * GRID, bool)
    bits[order[: cell.num_keep]] = True
    return {"grid": [GRID, GRID], "kept": base64.b64encode(np.packbits(bits).tobytes()).decode()}
