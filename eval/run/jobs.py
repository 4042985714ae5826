# SPDX-License-Identifier: Apache-2.0
"""From a study and a model to cells; and what a results folder accepts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visprune.errors import ConfigError
from visprune.eval.models.base import EvalModel
from visprune.eval.records.folder import ResultsFolder, write_json
from visprune.eval.records.record import Cell, canonical
from visprune.eval.run.claims import exclusive
from visprune.eval.study.grid import Study
from visprune.eval.study.variants import Variant, method_dict
from visprune.eval.tasks.base import Task
from visprune.version import __version__

__all__ = ["Job", "adopt_study", "jobs_of", "register", "task_at"]


@dataclass(frozen=True)
class Job:
    """A cell and what it needs to run.

    Attributes:
        cell: the cell.
        variant: its method.
        task: its task, with the seed.
        generation: options of ``generate``; the cell's hold the size of the batch too, where it
            changes answers.
    """

    cell: Cell
    variant: Variant
    task: Task
    generation: Mapping[str, Any]


def jobs_of(study: Study, model: EvalModel) -> list[Job]:
    """The cells of one model, in the order of the tables: task, seed, method."""
    described = model.describe()
    jobs = []
    for task in study.tasks:
        options = dict(model.generation(task, study.generation))
        generation = dict(options)
        if study.batch_size > 1 and described.get("dtype", "float32") != "float32":
            # In half precision sums depend on the shape of the batch, and answers on sums.
            generation["batch_size"] = study.batch_size
        for seed in study.seeds:
            seeded = task_at(task, seed)
            for variant in study.variants:
                choice = variant.at(seed)
                cell = Cell(
                    model=described,
                    method=method_dict(choice),
                    task=seeded.to_dict(),
                    prompt_style=study.prompt_style or model.style,
                    generation=generation,
                    seed=seed,
                    label=variant.label,
                    num_keep=variant.num_keep,
                    control=variant.control,
                    refused=model.refusal(choice, seeded),
                )
                jobs.append(Job(cell, variant, seeded, options))
    return jobs


def task_at(task: Task, seed: int) -> Task:
    """The task with the question set of a seed."""
    return dataclasses.replace(task, seed=seed)


def adopt_study(folder: ResultsFolder, study: Study) -> None:
    """Write ``study.json``, or check that the study is the one that is there, or extends it.

    Raises:
        ConfigError: the folder belongs to another study.
    """
    new = study.to_dict()
    with exclusive(folder.path / ".locks" / "study"):
        old = folder.study
        if old:
            gone = sorted(set(_grid(old)) - set(_grid(new)))
            if gone:
                raise ConfigError(
                    f"{str(folder.path)!r} holds another study ({old.get('name') or 'unnamed'}): "
                    f"{len(gone)} of its cells are not in this one, such as {gone[0]}. Use another "
                    f"folder for --out, or a study that contains it."
                )
        write_json(folder.path / "study.json", {**new, "visprune": __version__,
                                                "cells": old.get("cells", [])})  # fmt: skip


def _grid(study: dict[str, Any]) -> dict[str, bytes]:
    """The cells of a resolved study, weights aside: a name for people to the content."""
    named = {}
    shared = {key: study[key] for key in ("prompt_style", "generation")}
    for spec in study["models"]:
        model = {k: v for k, v in spec.items() if k not in _NOT_IDENTITY}
        for task in study["tasks"]:
            for seed in study["seeds"]:
                for method in study["methods"]:
                    parts = {k: v for k, v in method.items() if k not in _NOT_IDENTITY}
                    asked = {**task, "seed": seed}
                    whole = canonical([model, asked, parts, seed, shared])
                    digest = hashlib.sha256(whole).hexdigest()[:8]
                    where = f"{model['name']}, {task['task']}, seed {seed}"
                    named[f"{method['label']} ({where}; {digest})"] = whole
    return named


# What a study may change without changing an answer.
_NOT_IDENTITY = ("label", "control", "device")


def register(folder: ResultsFolder, cells: Sequence[Cell]) -> None:
    """Write cells and list them in ``study.json``, in order.

    Raises:
        ConfigError: the folder has answers of another model under the same name.
    """
    with exclusive(folder.path / ".locks" / "study"):
        known = folder.cells()
        for cell in cells:
            for other in known.values():
                _check_same_model(folder, cell, other)
        folder.add_cells(cells)
        study = folder.study
        order = dict.fromkeys([*study.get("cells", ()), *(cell.id for cell in cells)])
        write_json(folder.path / "study.json", {**study, "cells": list(order)})


def _check_same_model(folder: ResultsFolder, cell: Cell, other: Cell) -> None:
    """Raise if two models are called the same but are not."""
    if cell.model["name"] != other.model["name"] or dict(cell.model) == dict(other.model):
        return
    keys = sorted({*cell.model, *other.model})
    differ = [key for key in keys if cell.model.get(key) != other.model.get(key)]
    there, now = (model.get(differ[0]) for model in (other.model, cell.model))
    raise ConfigError(
        f"{str(folder.path)!r} holds answers of another {cell.model['name']!r}: "
        f"{', '.join(differ)} differ ({differ[0]} was {there!r}, is {now!r}). Use another folder "
        f"for --out."
    )
