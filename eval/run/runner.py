# SPDX-License-Identifier: Apache-2.0
"""Run a study: ask what has no answer yet, write each answer down, and be killed at any moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from visprune.errors import ConfigError
from visprune.eval.environment import describe
from visprune.eval.models.base import NO_IMAGE, EvalModel, ModelSpec
from visprune.eval.models.load import load_model
from visprune.eval.records.files import RecordsWriter
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.record import Cell, canonical
from visprune.eval.run.ask import Asker, picture_hash
from visprune.eval.run.claims import Claims, Done, asked_hash, own_first
from visprune.eval.run.jobs import Job, adopt_study, jobs_of, register
from visprune.eval.run.progress import Silent
from visprune.eval.study.grid import Study
from visprune.eval.tasks.base import Sample, SampleError, Task

__all__ = ["distinct", "process_number", "run_study"]

_POLL_SECONDS = 0.1


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
    loader: Callable[[ModelSpec], EvalModel] | None = None,
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
    rank, world, local = process_number()
    folder = ResultsFolder(out, create=True)
    adopt_study(folder, study)
    done = Done(folder, retry_errors=retry_errors)
    environment = folder.add_environment({**describe(), "rank": rank, "processes": world})
    progress = progress or Silent()
    for note in study.notes:
        progress.note(note)
    seen: set[str] = set()
    idle: list[Job] = []  # of models that can run nothing
    with folder.writer(rank) as writer:
        worker = _Worker(study, folder, writer, done, environment, progress)
        for spec in study.models:
            model = loader(spec) if loader else load_model(spec, local_rank=local)
            jobs = distinct(jobs_of(study, model), seen)
            register(folder, [job.cell for job in jobs])
            runs = [job for job in jobs if job.cell.refused is None]
            if not runs:
                idle += jobs
                continue
            _say_refused(progress, jobs)
            worker.run(model, runs, rank, world)
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


class _Worker:
    """One process at work on one model."""

    def __init__(
        self, study: Study, folder: ResultsFolder, writer: RecordsWriter, done: Done,
        environment: str, progress: Silent,
    ) -> None:  # fmt: skip
        self.study, self.folder, self.writer, self.done = study, folder, writer, done
        self.environment, self.progress = environment, progress

    def run(self, model: EvalModel, jobs: Sequence[Job], rank: int, world: int) -> None:
        """First everything that is free, then, patiently, what others are at work on."""
        sets: dict[bytes, Sequence[Sample]] = {}
        for job in jobs:
            if _key(job.task) not in sets:
                sets[_key(job.task)] = job.task.samples()
        for task in sets:
            self._check_pictures([job for job in jobs if _key(job.task) == task], sets[task])
        total = sum(len(sets[_key(job.task)]) for job in jobs)
        self.progress.plan(total, sum(self.done.count(job.cell.id) for job in jobs))
        self.done.own = self.writer
        for patient in (False, True):
            jobs = [
                job
                for job in jobs
                if not self._cell(model, job, sets[_key(job.task)], rank, world, patient=patient)
            ]
            # From now on what this process wrote is read back like what others wrote.
            self.done.own = None

    def _cell(
        self, model: EvalModel, job: Job, samples: Sequence[Sample], rank: int, world: int,
        *, patient: bool,
    ) -> bool:  # fmt: skip
        """Ask what is missing of a cell; returns whether all of it is there now."""
        cell, size = job.cell, self.study.batch_size
        self.done.refresh()
        missing = self._missing(job, samples)
        # Batches are cut from all samples, not from those that are missing: a study that was
        # killed asks the same batches when it goes on.
        order = own_first(-(-len(samples) // size), rank, world)
        todo = [number for number in order if 1 in missing[number * size : (number + 1) * size]]
        if todo:
            self.progress.cell(_title(cell), len(samples), len(samples) - sum(missing))
            choice = job.variant.at(cell.seed)
            asker = Asker(
                cell, job.task, self.environment, self.folder if self.study.pictures else None
            )
            options = (choice, job.task, cell.prompt_style, job.generation)
            with (
                Claims(self.folder.path / ".locks" / cell.id) as claims,
                model.answering(*options) as answerer,
            ):
                for number in claimed(claims, todo, patient=patient):
                    span = range(number * size, min((number + 1) * size, len(samples)))
                    self._batch(asker, answerer, [samples[i] for i in span], missing, span)
                    claims.release(number)
        if 1 in missing:
            return False
        self.done.forget(cell.id)
        return True

    def _missing(self, job: Job, samples: Sequence[Sample]) -> bytearray:
        """1 for each sample without a record.

        Raises:
            ConfigError: a record holds another prompt or other references than the sample has now.
        """
        have, cell = self.done.samples(job.cell.id), job.cell
        missing = bytearray(len(samples))
        for number, sample in enumerate(samples):
            if sample.id not in have:
                missing[number] = 1
                continue
            asked = have[sample.id]
            now = job.task.prompt(sample, cell.prompt_style)  # type: ignore[arg-type]
            if asked is not None and asked != asked_hash(
                {"prompt": now, "answers": sample.answers}
            ):
                raise ConfigError(
                    f"{str(self.folder.path)!r} holds an answer to another question under the name "
                    f"{sample.id!r} ({_title(cell)}): the data changed, or a records file came "
                    f"from another run. Use another folder for --out."
                )
        return missing

    def _check_pictures(self, jobs: Sequence[Job], samples: Sequence[Sample]) -> None:
        """Compare a few pictures with those that were asked about before.

        All of them would have to be read for a study that is nearly done; a few tell another
        version of a data set.

        Raises:
            ConfigError: a picture changed since its record was made.
        """
        seen = (job for job in jobs if job.cell.method["method"] != NO_IMAGE)
        job = next((job for job in seen if self.done.marks.get(job.cell.id)), None)
        if job is None:
            return
        marks = self.done.marks[job.cell.id]
        for sample in samples:
            if sample.id not in marks:
                continue
            try:
                digest = picture_hash(sample.image())
            except SampleError:
                continue
            prompt = job.task.prompt(sample, job.cell.prompt_style)  # type: ignore[arg-type]
            if job.cell.key(prompt, digest) != marks[sample.id]:
                raise ConfigError(
                    f"{str(self.folder.path)!r} holds an answer to another question or about "
                    f"another picture under the name {sample.id!r} ({_title(job.cell)}): the data "
                    f"changed. Use another folder for --out."
                )

    def _batch(
        self, asker: Asker, answerer: Any, batch: list[Sample], missing: bytearray, span: range
    ) -> None:
        """Ask a batch that this process holds, unless others have answered it meanwhile."""
        self.done.refresh()
        have = self.done.samples(asker.cell.id)
        wanted = {
            sample.id
            for sample, number in zip(batch, span, strict=True)
            if missing[number] and sample.id not in have
        }
        if wanted:
            records = asker.ask(answerer, batch)
            self.writer.write(record for record in records if record.sample in wanted)
        self.progress.advance(sum(missing[span.start : span.stop]))
        missing[span.start : span.stop] = bytes(len(span))


def claimed(claims: Claims, numbers: Sequence[int], *, patient: bool) -> Iterator[int]:
    """Yield batches as this process gets hold of them.

    Args:
        claims: the locks.
        numbers: batches, in order of preference.
        patient: come back to those that others hold until they are free; without, skip them.
    """
    while numbers:
        busy = []
        for number in numbers:
            if claims.take(number):
                yield number
            else:
                busy.append(number)
        if not patient:
            return
        numbers = busy
        if busy:
            time.sleep(_POLL_SECONDS)


def _key(task: Task) -> bytes:
    return canonical(task.to_dict())


def _title(cell: Cell) -> str:
    seed = f" seed {cell.seed}" if cell.seed else ""
    return f"{cell.task.get('task', '')}{seed}: {cell.label}"
