# SPDX-License-Identifier: Apache-2.0
"""Run a study: ask what has no answer yet, write each answer down, and be killed at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from visprune.errors import ConfigError
from visprune.eval.environment import describe
from visprune.eval.models.base import EvalModel, ModelEntry
from visprune.eval.models.load import load_model
from visprune.eval.models.names import check_name
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.run.claims import Done, Presence
from visprune.eval.run.jobs import Job, adopt_study, jobs_of, register, together
from visprune.eval.run.progress import Silent
from visprune.eval.run.walk import Desk, walk_model
from visprune.eval.study.grid import Study

__all__ = ["distinct", "process_number", "run_study"]


def process_number() -> tuple[int, int, int]:
    """(rank, processes, rank on this machine), as ``accelerate launch``, torchrun or MPI set them.

    No process group is made: nothing is ever sent from one process to another, so nothing waits for
    one that crashed.
    """
    rank = _first_int(0, "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    world = _first_int(1, "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    local = _first_int(
        rank, "LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
    )  # fmt: skip
    return rank, world, local


def _first_int(default: int, *names: str) -> int:
    """The first of these environment variables that is set, and not to an empty text.

    Raises:
        ConfigError: it is no whole number from 0.
    """
    for name in names:
        if text := os.environ.get(name, "").strip():
            if not text.isdecimal():
                raise ConfigError(
                    f"The environment variable {name} is {text!r}; launchers set it to a whole "
                    f"number from 0. Unset it where there is one process."
                )
            return int(text)
    return default


def run_study(
    study: Study,
    out: str | Path,
    *,
    loader: Callable[[ModelEntry], EvalModel] | None = None,
    retry_errors: bool = False,
    progress: Silent | None = None,
) -> ResultsFolder:
    """Run what is missing of a study; start it as often and in as many processes as you like.

    Args:
        study: the study.
        out: results folder.
        loader: makes a model of its spec; ``None``: by name.
        retry_errors: ask again where an error was recorded before.
        progress: where to show it; ``None``: nowhere.

    Returns:
        The folder. When this returns, every sample has a record, whoever made it.

    Raises:
        ConfigError: the folder holds another study, a name is unknown, nothing of the study can
            run, or the disk is full.
    """
    for spec in study.models if loader is None else ():
        check_name(
            spec.name, spec.checkpoint
        )  # of the last too, before the first is asked for hours
    rank, world, local = process_number()
    folder = ResultsFolder(out, create=True)
    done = Done(folder, retry_errors=retry_errors)
    described = {**describe(), "rank": rank, "processes": world}
    progress = progress or Silent()
    for note in study.notes:
        progress.note(note)
    seen: set[str] = set()
    idle: list[Job] = []  # of models that can run nothing
    locks = folder.path / ".locks"
    with Presence(locks / "at work") as presence, folder.writer(rank) as writer:
        adopt_study(folder, study, done.cells(), presence)
        for spec in study.models:
            model = loader(spec) if loader else load_model(spec, local_rank=local)
            jobs = distinct(jobs_of(study, model), seen)
            register(folder, study, spec, jobs, done.cells())
            runs = [job for job in jobs if job.cell.refused is None]
            if not runs:
                idle += jobs
                continue
            _say_refused(progress, jobs)
            size = together(study, model)
            if size != (study.batch_size or 1):
                progress.note(f"{model.name}: {size} questions are asked together (--batch-size).")
            environment = folder.add_environment({**described, "batch_size": size})
            desk = Desk(study, folder, writer, done, environment, progress)
            walk_model(desk, model, runs, rank, world)
    if len(idle) == len(seen):
        reasons = list(dict.fromkeys(str(job.cell.refused) for job in idle))
        why = reasons[0] if len(reasons) == 1 else " ".join(refusals(idle))
        raise ConfigError(f"Nothing of the study can run: {why}")
    _say_refused(progress, idle)
    return folder


def distinct(jobs: Sequence[Job], seen: set[str]) -> list[Job]:
    """Jobs whose cells were not seen before, in this list or an earlier one; adds them to those.

    A control under a label of its own is the same cell, and so is a model on another device.
    """
    found = []
    for job in jobs:
        if job.cell.id not in seen:
            seen.add(job.cell.id)
            found.append(job)
    return found


def refusals(jobs: Iterable[Job]) -> list[str]:
    """``"task: random 8, pool 8: reason"``, a line for each task and reason."""
    labels: dict[tuple[str, str], dict[str, None]] = {}
    for job in jobs:
        if job.cell.refused is not None:
            mine = labels.setdefault((job.task.name, job.cell.refused), {})
            mine[job.cell.label] = None
    return [f"{task}: {', '.join(mine)}: {reason}" for (task, reason), mine in labels.items()]


def _say_refused(progress: Silent, jobs: Iterable[Job]) -> None:
    for line in refusals(jobs):
        progress.note(f"left out: {line}")
