# SPDX-License-Identifier: Apache-2.0
"""From a study and a model to cells; and what a results folder accepts."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visprune.errors import ConfigError
from visprune.eval.models.base import EvalModel, ModelEntry
from visprune.eval.records.folder import ResultsFolder, write_json
from visprune.eval.records.record import Cell, canonical
from visprune.eval.run.claims import Presence, exclusive
from visprune.eval.study.grid import Study
from visprune.eval.study.variants import Variant, method_dict
from visprune.eval.tasks.base import Task
from visprune.version import __version__

__all__ = ["Job", "adopt_study", "jobs_of", "register", "task_at", "together"]


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
        size = together(study, model)
        if size > 1 and described.get("dtype", "float32") != "float32":
            # In half precision sums depend on the shape of the batch, and answers on sums.
            generation["batch_size"] = size
        shared: dict[str, Any] = {} if study.turns is None else {"turns": study.turns}
        shared |= {} if study.query_aware else {"query_aware": False}
        if shared:
            if (why := model.no_turns(query_aware=study.query_aware)) is not None:
                said = ", ".join(f"{key}={value}" for key, value in shared.items())
                raise ConfigError(f"{said}: {why}")
            options |= shared
            generation |= shared
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


def together(study: Study, model: EvalModel) -> int:
    """How many samples of a model are asked together."""
    return study.batch_size or model.together


def task_at(task: Task, seed: int) -> Task:
    """The task with the question set of a seed."""
    return dataclasses.replace(task, seed=seed)


def adopt_study(
    folder: ResultsFolder, study: Study, recorded: Collection[str], presence: Presence
) -> None:
    """Write ``study.json``, or check that the study contains what was asked of the one there.

    What was never asked binds nobody: a first try with a wrong name can be mended, and a model or
    a method that no record is of can be left out.

    Args:
        folder: the results folder.
        study: the study.
        recorded: cells that have records.
        presence: of this process, to be seen by others from here on.

    Raises:
        ConfigError: the folder belongs to another study, or a process is at work on another one.
    """
    new = study.to_dict()
    with exclusive(folder.path / ".locks" / "study"):
        old = folder.study
        cells = []
        made: dict[str, str] = {}
        if old:
            there, now, made = _grid(old), _grid(new), old.get("made", {})
            # A folder of an earlier version does not say which cell is of which entry.
            asked = {key for key in there if made.get(key, key) in recorded or not made}
            _check_contained(folder, old, {k: there[k] for k in asked if recorded}, now)
            if not there.keys() <= now.keys() and not presence.alone():
                raise ConfigError(
                    f"{str(folder.path)!r} is at work for another study "
                    f"({old.get('name') or 'unnamed'}). Use another folder for --out."
                )
            made = {key: cell for key, cell in made.items() if key in now}
            kept = {*recorded, *made.values()}
            cells = [cell for cell in old.get("cells", ()) if cell in kept]
        write_json(
            folder.path / "study.json",
            {**new, "visprune": __version__, "cells": cells, "made": made},
        )
        presence.show()


def _check_contained(
    folder: ResultsFolder, old: Mapping[str, Any], asked: Mapping[str, _Entry],
    now: Mapping[str, _Entry],
) -> None:  # fmt: skip
    """Raise unless a study holds what was asked, and as many samples of it."""
    where = f"{str(folder.path)!r} holds another study ({old.get('name') or 'unnamed'}): "
    way = "Use another folder for --out, or a study that contains it."
    gone = sorted(entry.name for key, entry in asked.items() if key not in now)
    if gone:
        raise ConfigError(
            f"{where}{len(gone)} of its cells are not in this one, such as {gone[0]}. {way}"
        )
    for key, entry in sorted(asked.items(), key=lambda item: item[1].name):
        if (now[key].limit or math.inf) < (entry.limit or math.inf):
            raise ConfigError(
                f"{where}it asks {entry.limit or 'all'} samples of {entry.name}, and this one "
                f"{now[key].limit}. A limit can grow, not shrink. {way}"
            )


@dataclass(frozen=True)
class _Entry:
    """A cell of a study before its model is loaded.

    Attributes:
        name: for people.
        limit: samples asked.
    """

    name: str
    limit: int | None


def _grid(study: Mapping[str, Any]) -> dict[str, _Entry]:
    """The cells of a resolved study, weights and limits aside, by a hash of their content."""
    entries = {}
    for spec in study["models"]:
        for task in study["tasks"]:
            for seed in study["seeds"]:
                for method in study["methods"]:
                    key = _entry_key(study, spec, task, seed, method)
                    where = f"{spec['name']}, {task['task']}, seed {seed}"
                    name = f"{method['label']} ({where}; {key[:8]})"
                    entries[key] = _Entry(name, task.get("limit"))
    return entries


def _entry_key(
    study: Mapping[str, Any], spec: Mapping[str, Any], task: Mapping[str, Any], seed: int,
    method: Mapping[str, Any],
) -> str:  # fmt: skip
    """Hash of one cell of a study's grid (hex)."""
    model, parts = ({k: v for k, v in x.items() if k not in _NOT_IDENTITY} for x in (spec, method))
    asked = {**{k: v for k, v in task.items() if k != "limit"}, "seed": seed}
    shared = {key: study[key] for key in _SHARED if key in study}
    return hashlib.sha256(canonical([model, asked, parts, seed, shared])).hexdigest()[:16]


# What all cells of a study have in common.
_SHARED = ("prompt_style", "generation", "turns", "query_aware")
# What a study may change without changing an answer.
_NOT_IDENTITY = ("label", "control", "device")


def register(
    folder: ResultsFolder, study: Study, spec: ModelEntry, jobs: Sequence[Job],
    recorded: Collection[str],
) -> None:  # fmt: skip
    """Write the cells of a model and list them in ``study.json``, in order.

    Raises:
        ConfigError: the folder has answers of another model under the same name.
    """
    with exclusive(folder.path / ".locks" / "study"):
        known = [cell for cell in folder.cells().values() if cell.id in recorded]
        cells = [job.cell for job in jobs]
        for cell in cells:
            for other in known:
                _check_same_model(folder, cell, other)
        folder.add_cells(cells)
        there, resolved, model = folder.study, study.to_dict(), spec.to_dict()
        order = dict.fromkeys([*there.get("cells", ()), *(cell.id for cell in cells)])
        keys = {
            _entry_key(resolved, model, job.task.to_dict(), job.cell.seed, job.variant.to_dict()):
            job.cell.id for job in jobs
        }  # fmt: skip
        write_json(
            folder.path / "study.json",
            {**there, "cells": list(order), "made": {**there.get("made", {}), **keys}},
        )


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
