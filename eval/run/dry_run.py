# SPDX-License-Identifier: Apache-2.0
"""`visprune eval --dry-run`: what a study would ask, what of it is done, how long it may take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from visprune.eval.models.base import EvalModel, ModelEntry
from visprune.eval.models.load import load_model
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.record import canonical
from visprune.eval.run.ask import Asker
from visprune.eval.run.claims import Done
from visprune.eval.run.jobs import Job, jobs_of, task_at
from visprune.eval.run.runner import distinct
from visprune.eval.study.grid import Study
from visprune.eval.tasks.base import Sample, Task
from visprune.eval.tasks.loading import Unreachable

__all__ = ["Planned", "plan_study", "print_plan"]

_Sets = dict[bytes, Sequence[Sample] | None]

_PROBES = 2  # samples asked for the estimate; the last one counts


@dataclass(frozen=True)
class Planned:
    """One cell of the plan.

    Attributes:
        model: name of the model.
        task: name of the task, with the options that are not its defaults.
        seed: the seed.
        label: the method.
        samples: how many the task has; ``None``: its data is not on this machine.
        done: how many of them have a record.
        seconds: for what is left, in one process; ``None``: the model is not on this machine.
        refused: why the cell cannot run, if it cannot.
    """

    model: str
    task: str
    seed: int
    label: str
    samples: int | None
    done: int = 0
    seconds: float | None = None
    refused: str | None = None


def plan_study(
    study: Study,
    out: str | Path | None = None,
    *,
    loader: Callable[[ModelEntry], EvalModel] = load_model,
) -> list[Planned]:
    """List the cells of a study, each once; nothing is written.

    The estimate comes from a model that is on this machine: two questions are put to the untouched
    model, and the second one's time stands for all. Pruned models are faster, so it is an upper
    bound for most methods.

    Args:
        study: the study.
        out: results folder that it would go on with.
        loader: makes a model of its spec.

    Raises:
        ConfigError: a name is unknown, here and elsewhere, or a model's folder is unusable.
    """
    folder = None
    if out is not None and (Path(out) / "cells").is_dir():
        folder = ResultsFolder(out)
    done = Done(folder) if folder is not None else None
    planned: list[Planned] = []
    sets: _Sets = {}
    seen: set[str] = set()
    for spec in study.models:
        try:
            model = loader(spec)
        except Unreachable:
            planned += _unloaded(study, spec, sets)
            continue
        jobs = distinct(jobs_of(study, model), seen)
        each = _probe(model, jobs, sets)
        for job in jobs:
            total = _count(job.task, sets)
            have = 0 if done is None else done.count(job.cell.id)
            have = have if total is None else min(have, total)
            left = None if each is None or total is None else each * (total - have)
            if job.cell.refused is not None:
                left = 0.0
            planned.append(
                Planned(spec.name, _title(job.task), job.cell.seed, job.cell.label, total, have,
                        left, job.cell.refused)
            )  # fmt: skip
    return planned


def _title(task: Task) -> str:
    """The task's name, with what was set on it."""
    options = {f.name: (getattr(task, f.name), f.default) for f in dataclasses.fields(task)}
    words = [
        f"{name}={value if value != '' else repr(value)}"
        for name, (value, default) in options.items()
        if value != default and name != "seed"
    ]
    return f"{task.name} ({', '.join(words)})" if words else task.name


def _samples(task: Task, sets: _Sets) -> Sequence[Sample] | None:
    """Samples of a task; ``None`` where its data cannot be reached from here."""
    key = canonical(task.to_dict())
    if key not in sets:
        try:
            sets[key] = task.samples()
        except Unreachable:
            sets[key] = None
    return sets[key]


def _count(task: Task, sets: _Sets) -> int | None:
    samples = _samples(task, sets)
    return None if samples is None else len(samples)


def _unloaded(study: Study, spec: ModelEntry, sets: _Sets) -> list[Planned]:
    return [
        Planned(spec.name, _title(task), seed, variant.label, _count(task_at(task, seed), sets))
        for task in study.tasks
        for seed in study.seeds
        for variant in study.variants
    ]


def _probe(model: EvalModel, jobs: Sequence[Job], sets: _Sets) -> float | None:
    """Seconds of one sample, of the first cell that the model can run."""
    for job in jobs:
        samples = _samples(job.task, sets)
        if job.cell.refused is not None or not samples:
            continue
        asker = Asker(job.cell, job.task, "")
        options = (job.variant.at(job.cell.seed), job.task)
        with model.answering(*options, job.cell.prompt_style, job.generation) as answerer:
            for number in range(min(_PROBES, len(samples))):
                begin = time.perf_counter()
                asker.ask(answerer, [samples[number]])
                seconds = time.perf_counter() - begin
        return seconds
    return None


def print_plan(
    console: Console, planned: Sequence[Planned], *, processes: int = 1, timed: bool = False,
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print the plan: a table per model and task, a row per method, and the sum.

    Args:
        console: where to.
        planned: the cells.
        processes: that share the work.
        timed: latency is measured afterwards, which the estimate leaves out.
        notes: what else to say, such as controls that were left out.
    """
    groups: dict[tuple[str, str], list[Planned]] = {}
    for row in planned:
        groups.setdefault((row.model, row.task), []).append(row)
    for (model, task), rows in groups.items():
        seeds = ", ".join(map(str, dict.fromkeys(row.seed for row in rows)))
        # Names of folders are long: in a column they would break every row of the table.
        _say(console, f"{model}\n  {task}\n  seed {seeds}")
        console.print(_plan_table(rows))
    reasons: dict[str, dict[str, None]] = {}
    for row in planned:
        if row.refused:
            reasons.setdefault(row.refused, {})[row.label] = None
    for line in (*(f"{', '.join(labels)}: {why}" for why, labels in reasons.items()), *notes):
        _say(console, line)
    known = [row.seconds for row in planned if row.seconds is not None]
    missing = sum((row.samples or row.done) - row.done for row in planned if not row.refused)
    text = f"{len(planned)} cells, {missing} samples to ask"
    if known:
        text += f", about {_duration(sum(known) / processes)} in {processes} process(es) like this"
        text += ", latency not counted" * timed
    counted = [row for row in planned if row.samples is not None]
    if unknown := dict.fromkeys(row.task for row in planned if row.samples is None):
        text += f", not counting {', '.join(unknown)}: data not on this machine"
    if names := dict.fromkeys(row.model for row in counted if row.seconds is None):
        text += f"; no estimate for {', '.join(names)}: not on this machine"
    console.print(f"{text}. Nothing was run.", markup=False, highlight=False)


def _plan_table(rows: Sequence[Planned]) -> Table:
    """A row per method, seeds summed."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method", overflow="fold")
    for name in ("samples", "done", "left to run"):
        table.add_column(name, justify="right")
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        seconds = [row.seconds for row in mine if row.seconds is not None]
        left = _duration(sum(seconds) if len(seconds) == len(mine) else None)
        left = "cannot run" if all(row.refused for row in mine) else left
        every = [row.samples for row in mine if row.samples is not None]
        total = sum(every) if len(every) == len(mine) else "?"
        counts = (total, sum(row.done for row in mine))
        table.add_row(label, *map(str, counts), left)
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
