# SPDX-License-Identifier: Apache-2.0
"""`visprune eval --dry-run`: what a study would ask, what of it is done, how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from visprune.errors import ConfigError
from visprune.eval.ask import Asker
from visprune.eval.claims import Done
from visprune.eval.jobs import Job, jobs_of, task_at
from visprune.eval.models import EvalModel, ModelSpec, load_model
from visprune.eval.records import canonical
from visprune.eval.results import ResultsFolder
from visprune.eval.study import Study
from visprune.eval.tasks.base import Sample, Task

__all__ = ["Planned", "plan_study", "print_plan"]

_PROBES = 2  # samples asked for the estimate; the last one counts


@dataclass(frozen=True)
class Planned:
    """One cell of the plan.

    Attributes:
        model: name of the model.
        task: name of the task.
        seed: the seed.
        label: the method.
        samples: how many the task has.
        done: how many of them have a record.
        seconds: for what is left, in one process; ``None``: the model is not on this machine.
        refused: why the cell cannot run, if it cannot.
    """

    model: str
    task: str
    seed: int
    label: str
    samples: int
    done: int = 0
    seconds: float | None = None
    refused: str | None = None


def plan_study(
    study: Study,
    out: str | Path | None = None,
    *,
    loader: Callable[[ModelSpec], EvalModel] = load_model,
) -> list[Planned]:
    """List the cells of a study; nothing is written.

    The estimate comes from a model that is on this machine: two questions are put to the untouched
    model, and the second one's time stands for all. Pruned models are faster, so it is an upper
    bound for most methods.

    Args:
        study: the study.
        out: results folder that it would go on with.
        loader: makes a model of its spec.
    """
    folder = None
    if out is not None and (Path(out) / "cells").is_dir():
        folder = ResultsFolder(out)
    done = Done(folder) if folder is not None else None
    planned: list[Planned] = []
    sets: dict[bytes, Sequence[Sample]] = {}
    for spec in study.models:
        try:
            model = loader(spec)
        except ConfigError:
            planned += _unloaded(study, spec, sets)
            continue
        jobs = jobs_of(study, model)
        each = _probe(model, jobs, sets)
        for job in jobs:
            total = len(_samples(job.task, sets))
            have = 0 if done is None else min(done.count(job.cell.id), total)
            left = None if each is None else each * (total - have)
            if job.cell.refused is not None:
                left = 0.0
            planned.append(
                Planned(spec.name, job.task.name, job.cell.seed, job.cell.label, total, have,
                        left, job.cell.refused)
            )  # fmt: skip
    return planned


def _samples(task: Task, sets: dict[bytes, Sequence[Sample]]) -> Sequence[Sample]:
    key = canonical(task.to_dict())
    if key not in sets:
        sets[key] = task.samples()
    return sets[key]


def _unloaded(study: Study, spec: ModelSpec, sets: dict[bytes, Sequence[Sample]]) -> list[Planned]:
    return [
        Planned(spec.name, task.name, seed, variant.label, len(_samples(task_at(task, seed), sets)))
        for task in study.tasks
        for seed in study.seeds
        for variant in study.variants
    ]


def _probe(
    model: EvalModel, jobs: Sequence[Job], sets: dict[bytes, Sequence[Sample]]
) -> float | None:
    """Seconds of one sample, of the first cell that the model can run."""
    for job in jobs:
        samples = _samples(job.task, sets)
        if job.cell.refused is not None or not samples:
            continue
        asker = Asker(job.cell, job.task, "")
        options = (job.variant.at(job.cell.seed), job.task)
        with model.answering(*options, job.cell.prompt_style, job.cell.generation) as answerer:
            for number in range(min(_PROBES, len(samples))):
                begin = time.perf_counter()
                asker.ask(answerer, [samples[number]])
                seconds = time.perf_counter() - begin
        return seconds
    return None


def print_plan(console: Console, planned: Sequence[Planned], *, processes: int = 1) -> None:
    """Print the plan as a table with its sum."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("model", "task", "seed", "method"):
        table.add_column(name, overflow="fold")
    for name in ("samples", "done", "left to run"):
        table.add_column(name, justify="right")
    for row in planned:
        left = "cannot run" if row.refused else _duration(row.seconds)
        cells = (row.model, row.task, str(row.seed), row.label, str(row.samples), str(row.done))
        table.add_row(*cells, left)
    console.print(table)
    for row in planned:
        if row.refused:
            console.print(f"{row.label}: {row.refused}", markup=False, highlight=False)
    known = [row.seconds for row in planned if row.seconds is not None]
    missing = sum(row.samples - row.done for row in planned if not row.refused)
    text = f"{len(planned)} cells, {missing} samples to ask"
    if known:
        text += f", about {_duration(sum(known) / processes)} in {processes} process(es) like this"
    if len(known) < len(planned):
        names = dict.fromkeys(row.model for row in planned if row.seconds is None)
        text += f"; no estimate for {', '.join(names)}: not on this machine"
    console.print(f"{text}. Nothing was run.", markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
