# SPDX-License-Identifier: Apache-2.0
"""One process at work on one model: block by block of questions, every cell in turn.

A block is a stretch of a task's samples. While it is at work its pictures are read once and encoded
once, whatever number of cells asks about them; then they are dropped, so that memory does not grow
with the task. Within a block, questions of about the same length are asked together.

Blocks and batches follow from the samples and the size of the batch alone. In half precision
answers depend on what is asked together, and there a study that was stopped asks the same batches
when it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.models.base import NO_IMAGE, Answerer, EvalModel
from visprune.eval.records.files import RecordsWriter
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.record import Cell, Record, canonical
from visprune.eval.run.album import Album, picture_hash
from visprune.eval.run.ask import Asker
from visprune.eval.run.batches import batches_of, blocks_of
from visprune.eval.run.claims import Claims, Done, asked_hash, lock_of, own_first
from visprune.eval.run.jobs import Job, together
from visprune.eval.run.progress import Silent
from visprune.eval.run.turns import blocks_between, by_picture, dialogues
from visprune.eval.study.grid import Study
from visprune.eval.tasks.base import Sample, SampleError

__all__ = ["Desk", "walk_model"]

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Desk:
    """What a process works with.

    Attributes:
        study: the study.
        folder: where its records are.
        writer: the file of records of this process.
        done: which samples have a record.
        environment: id of what this process runs on.
        progress: where to show it.
    """

    study: Study
    folder: ResultsFolder
    writer: RecordsWriter
    done: Done
    environment: str
    progress: Silent


@dataclass
class _Open:
    """A cell that is at work.

    Attributes:
        job: the cell and what it needs.
        missing: 1 for each sample without a record.
    """

    job: Job
    missing: bytearray

    def left(self, span: range) -> int:
        """How many samples of a block have no record."""
        return self.missing.count(1, span.start, span.stop)


def walk_model(desk: Desk, model: EvalModel, jobs: Sequence[Job], rank: int, world: int) -> None:
    """Ask everything that is missing of one model's cells.

    First everything that is free, then, patiently, what other processes are at work on.

    Raises:
        ConfigError: what is asked now is not what was asked before, or the disk is full.
    """
    groups: dict[bytes, list[Job]] = {}
    for job in jobs:
        groups.setdefault(canonical(job.task.to_dict()), []).append(job)
    tell = _Teller(desk, model)
    walks = [_Walk(desk, model, group, group[0].task.samples(), tell) for group in groups.values()]
    for walk in walks:
        walk.check_pictures()
    total = sum(len(walk.jobs) * len(walk.samples) for walk in walks)
    desk.progress.plan(total, sum(desk.done.count(job.cell.id) for job in jobs))
    desk.done.own = desk.writer
    for patient in (False, True):
        for walk in walks:
            walk.go(rank, world, patient=patient)
        # From now on what this process wrote is read back like what others wrote.
        desk.done.own = None


class _Teller:
    """Says once what is not as it seems: the first picture that is cut, the first long question.

    Args:
        desk: where to say it.
        model: the model.
    """

    def __init__(self, desk: Desk, model: EvalModel) -> None:
        self._progress, self._model = desk.progress, model
        self._told: set[str] = set()

    def picture(self, image: Image.Image) -> None:
        """A picture was read."""
        if "picture" not in self._told and (said := self._model.unseen(image.size)) is not None:
            self._say("picture", said)

    def records(self, records: Sequence[Record]) -> None:
        """Samples were answered."""
        long = next((record for record in records if record.beyond), None)
        if long is not None and "length" not in self._told:
            self._say(
                "length",
                f"{self._model.name}: the question {long.sample!r} and its answer are "
                f"{long.beyond} tokens longer than the positions that the model was made for; such "
                f"answers are marked (beyond) and counted in the report.",
            )

    def _say(self, what: str, text: str) -> None:
        self._told.add(what)
        self._progress.note(text)


class _Walk:
    """The cells that ask the same samples.

    Args:
        desk: what the process works with.
        model: the model.
        jobs: the cells.
        samples: of their task.
        tell: says what is not as it seems.
    """

    def __init__(
        self, desk: Desk, model: EvalModel, jobs: Sequence[Job], samples: Sequence[Sample],
        tell: _Teller,
    ) -> None:  # fmt: skip
        self.desk, self.model, self.jobs, self.samples = desk, model, list(jobs), samples
        self.album = Album(desk.folder if desk.study.pictures else None, tell.picture)
        self.tell = tell.records
        self.batch_size = together(desk.study, model)
        self.turns, self.query_aware = desk.study.turns, desk.study.query_aware
        apart = self.turns is None and self.query_aware
        self.pictures = [] if apart else [sample.cluster or sample.id for sample in samples]
        self.encodings = {job.cell.id: self._encoding(job) for job in jobs}

    def _encoding(self, job: Job) -> Hashable:
        return self.model.encodes(job.variant.at(job.cell.seed))

    def go(self, rank: int, world: int, *, patient: bool) -> None:
        """Ask what is missing, own blocks first; cells that are complete leave."""
        desk = self.desk
        desk.done.refresh()
        cells = [_Open(job, self._missing(job)) for job in self.jobs]
        blocks = self._blocks()
        for number in own_first(len(blocks), rank, world):
            todo = [cell for cell in cells if cell.left(blocks[number])]
            if todo:
                order = partial(own_first, rank=rank, world=world)
                self._block(todo, blocks[number], order, patient=patient)
        for cell in cells:
            if 1 not in cell.missing:
                self.jobs.remove(cell.job)
                desk.done.forget(cell.job.cell.id)

    def _block(
        self, cells: Sequence[_Open], span: range, order: Callable[[int], list[int]],
        *, patient: bool,
    ) -> None:  # fmt: skip
        """Put a block to every cell; those that share an encoding follow each other."""
        block = [self.samples[number] for number in span]
        batches = self._batches(cells[0].job, block, span)
        groups: dict[Hashable, list[_Open]] = {}
        for cell in cells:
            groups.setdefault(self.encodings[cell.job.cell.id], []).append(cell)
        try:
            for group in groups.values():
                for cell in group:
                    visit = _Visit(self, cell, span, block)
                    visit.ask([batches[i] for i in order(len(batches))], patient=patient)
                self.model.forget()
        finally:
            self.model.forget()
            self.album.clear()

    def _blocks(self) -> list[range]:
        """Numbers of the samples, block by block."""
        spans = blocks_of(len(self.samples), self.batch_size)
        return spans if self.turns is None else blocks_between(spans, self.pictures)

    def _batches(self, job: Job, block: Sequence[Sample], span: range) -> list[list[int]]:
        """Places in a block that are asked together: about the same length, or on one cache."""
        if not self.query_aware:
            return by_picture(self.pictures[span.start : span.stop])
        if self.turns is None:
            lengths = [self._length(job, sample) for sample in block]
            return batches_of(lengths, self.batch_size)
        return [
            [number - span.start for number in dialogue]
            for dialogue in dialogues(self.pictures, self.turns)
            if dialogue[0] in span
        ]

    def _length(self, job: Job, sample: Sample) -> int:
        """Length of a sample's prompt, where it matters."""
        if self.batch_size == 1:
            return 0
        return self.model.prompt_length(job.task.prompt(sample, job.cell.prompt_style))  # type: ignore[arg-type]

    def _missing(self, job: Job) -> bytearray:
        """1 for each sample without a record.

        Raises:
            ConfigError: a record holds another prompt or other references than the sample has now.
        """
        have, cell = self.desk.done.samples(job.cell.id), job.cell
        missing = bytearray(len(self.samples))
        for number, sample in enumerate(self.samples):
            if sample.id not in have:
                missing[number] = 1
                continue
            asked = have[sample.id]
            now = job.task.prompt(sample, cell.prompt_style)  # type: ignore[arg-type]
            if asked is not None and asked != asked_hash(
                {"prompt": now, "answers": sample.answers}
            ):
                raise ConfigError(
                    f"{str(self.desk.folder.path)!r} holds an answer to another question under the "
                    f"name {sample.id!r} ({_title(cell)}): the data changed, or a records file "
                    f"came from another run. Use another folder for --out."
                )
        return missing

    def check_pictures(self) -> None:
        """Compare a few pictures with those that were asked about before.

        All of them would have to be read for a study that is nearly done; a few tell another
        version of a data set.

        Raises:
            ConfigError: a picture changed since its record was made.
        """
        marked = self.desk.done.marks
        seen = (job for job in self.jobs if job.cell.method["method"] != NO_IMAGE)
        job = next((job for job in seen if marked.get(job.cell.id)), None)
        if job is None:
            return
        marks = marked[job.cell.id]
        for sample in self.samples:
            if sample.id not in marks:
                continue
            try:
                digest = picture_hash(sample.image())
            except SampleError:
                continue
            prompt = job.task.prompt(sample, job.cell.prompt_style)  # type: ignore[arg-type]
            if job.cell.key(prompt, digest) != marks[sample.id]:
                raise ConfigError(
                    f"{str(self.desk.folder.path)!r} holds an answer to another question or about "
                    f"another picture under the name {sample.id!r} ({_title(job.cell)}): the data "
                    f"changed. Use another folder for --out."
                )


class _Visit:
    """One cell at one block.

    Args:
        walk: the walk.
        cell: the cell.
        span: numbers of the block's samples.
        block: the samples.
    """

    def __init__(self, walk: _Walk, cell: _Open, span: range, block: Sequence[Sample]) -> None:
        self.walk, self.desk, self.cell = walk, walk.desk, cell
        self.span, self.block = span, block
        # Where the batch belongs to what a cell is, its answers depend on what is asked together.
        self.whole = not {"batch_size", "turns"}.isdisjoint(cell.job.cell.generation)

    def ask(self, batches: Sequence[Sequence[int]], *, patient: bool) -> None:
        """Ask what is missing of the block.

        Args:
            batches: places in the block, in order of preference.
            patient: come back to what other processes hold until it is free; without, skip it.
        """
        job = self.cell.job
        done = len(self.walk.samples) - self.cell.missing.count(1)
        self.desk.progress.cell(_title(job.cell), len(self.walk.samples), done)
        asker = Asker(job.cell, job.task, self.desk.environment, self.walk.album)
        choice, style = job.variant.at(job.cell.seed), job.cell.prompt_style
        with (
            Claims(self.desk.folder.path / ".locks" / job.cell.id) as claims,
            self.walk.model.answering(choice, job.task, style, job.generation) as answerer,
        ):
            while batches:
                busy = [b for b in batches if not self._batch(b, claims, asker, answerer)]
                if not patient:
                    return
                batches = busy
                if busy:
                    time.sleep(_POLL_SECONDS)

    def _batch(
        self, batch: Sequence[int], claims: Claims, asker: Asker, answerer: Answerer
    ) -> bool:
        """Ask what this process can get hold of; returns whether nothing of the batch is left."""
        missing = self.cell.missing
        wanted = [place for place in batch if missing[self.span[place]]]
        with self._held(claims, wanted) as held:
            if held:
                self.desk.done.refresh()
                have = self.desk.done.samples(self.cell.job.cell.id)
                ours = [place for place in held if self.block[place].id not in have]
                if ours:
                    asked = batch if self.whole else ours
                    names = {self.block[place].id for place in ours}
                    records = asker.ask(answerer, [self.block[place] for place in asked])
                    self.desk.writer.write(r for r in records if r.sample in names)
                    self.walk.tell(records)
                for place in held:
                    missing[self.span[place]] = 0
                self.desk.progress.advance(len(held))
        return len(held) == len(wanted)

    @contextmanager
    def _held(self, claims: Claims, places: Sequence[int]) -> Iterator[list[int]]:
        """Hold what other processes do not; a batch that is asked whole: all of it, or nothing."""
        held: list[int] = []
        try:
            for place in places:
                if claims.take(lock_of(self.block[place].id)):
                    held.append(place)
            yield held if not self.whole or len(held) == len(places) else []
        finally:
            for place in held:
                claims.release(lock_of(self.block[place].id))


def _title(cell: Cell) -> str:
    seed = f" seed {cell.seed}" if cell.seed else ""
    return f"{cell.task.get('task', '')}{seed}: {cell.label}"
