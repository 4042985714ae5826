# SPDX-License-Identifier: Apache-2.0
"""Kill -9 at any moment, any number of processes: the same final table, none lost, none twice."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.instant import Instant, Tiling, instant_study, loader
from tests.eval.small import small_embedded
from visprune.eval.models.base import Output, Request
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.run.runner import run_study
from visprune.eval.study.grid import Study, build_study

# Forked children: what takes time is imported once. Tensors they touch on one thread alone.
FORK = multiprocessing.get_context("fork")


class Slow(Instant):
    """Takes a moment for each batch, so that a kill can fall anywhere."""

    def _answer(self, requests: Sequence[Request]) -> list[Output]:
        time.sleep(0.006)
        return super()._answer(requests)


@functools.cache
def study(batch_size: int = 1) -> Study:
    return instant_study(
        task=Tiling(limit=60, broken=(11,)),
        methods=["todre"],
        budgets=[4],
        seeds=[0, 1],
        batch_size=batch_size,
    )


def work(out: Path, rank: int, world: int, batch_size: int, model: Instant | None = None) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    run_study(study(batch_size), out, loader=loader(model or Slow(failing=(17,))))


def start(out: Path, world: int, batch_size: int = 1) -> list[BaseProcess]:
    processes = [FORK.Process(target=work, args=(out, i, world, batch_size)) for i in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def table(folder: ResultsFolder) -> list[dict[str, Any]]:
    """Everything that a report can see, but for times and processes."""
    rows = [dataclasses.asdict(record) for record in folder.records()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "env")} for row in rows]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole")
    model = Instant(failing=(17,))
    whole = run_study(study(), out, loader=loader(model))
    assert len(table(whole)) == 2 * 2 * 60
    return table(whole)


def written(out: Path) -> int:
    """Bytes in all records files."""
    return sum(path.stat().st_size for path in out.glob("records*.jsonl"))


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(tmp_path: Path, expected: list[dict[str, Any]], seed: int) -> None:
    """Each round starts 1 to 3 processes and kills some of them after up to 20 more records."""
    chance = random.Random(seed)
    kills = 0
    for size in (1, 4):
        study(size)  # built once, before the processes fork
    while True:
        world, batch_size = chance.choice([1, 2, 3]), chance.choice([1, 1, 4])
        enough = written(tmp_path) + chance.randrange(0, 10_000)
        processes = start(tmp_path, world, batch_size)
        while written(tmp_path) < enough and any(process.is_alive() for process in processes):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.003))
        victims = chance.sample(processes, chance.randint(1, world))
        alive = [process for process in victims if process.is_alive()]
        for process in alive:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        if not alive:
            break
        kills += len(alive)
        time.sleep(chance.uniform(0.0, 0.02))  # the others go on for a while
        for process in processes:
            process.kill()
            process.join(60)
            assert process.exitcode in (0, -signal.SIGKILL)
    finish(processes)
    folder = ResultsFolder(tmp_path)
    counts = Counter((values["cell"], values["sample"]) for values in folder.lines())
    assert len(counts) == 240
    assert set(counts.values()) == {1}
    assert table(folder) == expected
    assert kills >= 4


def test_what_a_crashed_process_left_is_taken_by_the_others(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """Rank 1 dies at once: rank 0 of 2 still finishes, with all samples, without a restart."""
    processes = start(tmp_path, 2)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGKILL)
    finish(processes[:1])
    processes[1].join()
    assert table(ResultsFolder(tmp_path)) == expected


def test_two_separate_runs_on_one_folder_share_the_work(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    both = FORK.Barrier(2)

    class Together(Instant):
        met = False

        def _answer(self, requests: Sequence[Request]) -> list[Output]:
            if not self.met:  # each holds a batch before either goes on
                both.wait(60)
                self.met = True
            return super()._answer(requests)

    models = [Together(failing=(17,)) for _ in range(2)]
    processes = [FORK.Process(target=work, args=(tmp_path, 0, 1, 1, x)) for x in models]
    for process in processes:
        process.start()
    finish(processes)
    folder = ResultsFolder(tmp_path)
    counts = Counter((values["cell"], values["sample"]) for values in folder.lines())
    assert set(counts.values()) == {1}
    assert table(folder) == expected
    assert len(folder.record_files()) == 2


def test_two_runs_with_other_batch_sizes_ask_nothing_twice(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    log = tmp_path / "asked"

    class Told(Slow):
        """Writes down what it is asked, in whatever process; a failing batch is asked again."""

        def _answer(self, requests: Sequence[Request]) -> list[Output]:
            outputs = super()._answer(requests)
            with log.open("a") as file:
                file.write("".join(f"{request.sample.id}\n" for request in requests))
            return outputs

    out = tmp_path / "out"
    models = [(size, Told(failing=(17,))) for size in (1, 4)]
    processes = [FORK.Process(target=work, args=(out, 0, 1, *each)) for each in models]
    for process in processes:
        process.start()
    finish(processes)
    assert table(ResultsFolder(out)) == expected
    asked = Counter(log.read_text().split())
    assert len(ResultsFolder(out).record_files()) == 2  # both had their part
    # Two cells a seed; of the broken picture and of the question that fails there is no answer.
    assert asked == {name: 2 for seed in (0, 1) for i in range(60)
                     if (name := f"{seed}/{i}")[2:] not in ("11", "17")}  # fmt: skip


def wait_for(out: Path, count: int) -> None:
    """Wait until there are so many records."""
    end = time.monotonic() + 120
    while sum(path.read_bytes().count(b"\n") for path in out.glob("records*.jsonl")) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_waits_for_what_another_holds_and_takes_it_when_that_dies(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """The first process stops in the midst of a batch, so that its claim stays; then it dies."""

    class Stuck(Instant):
        def _answer(self, requests: Sequence[Request]) -> list[Output]:
            if requests[0].sample.id == "0/30":
                time.sleep(60)
            return super()._answer(requests)

    stuck = FORK.Process(target=work, args=(tmp_path, 0, 1, 1, Stuck(failing=(17,))))
    stuck.start()
    wait_for(tmp_path, 30)  # samples 0 to 29; the first process now holds 30
    (other,) = start(tmp_path, 1)
    wait_for(tmp_path, 240 - 1)
    other.join(0.5)
    assert other.is_alive()  # everything else is done; it waits
    folder = ResultsFolder(tmp_path)
    assert len(folder.records()) == 240 - 1
    assert stuck.pid is not None
    os.kill(stuck.pid, signal.SIGKILL)
    finish([other])
    stuck.join()
    assert table(folder) == expected


@functools.cache
def small_vlm() -> VLM:
    torch.set_num_threads(1)  # so that children can be forked
    model, processor = small_embedded()
    return VLM(model, processor, name="small", style="plain", template=PLAIN)


@functools.cache
def encoded_study() -> Study:
    """Cells of three encodings: outside the encoder, and two reductions inside it."""
    return build_study(
        {
            "models": ["small"], "tasks": [{"task": "embedded", "limit": 20}], "batch_size": 3,
            "methods": ["todre", {"method": "tome", "r": 20}, {"method": "tome", "r": 30}],
            "budgets": [16], "controls": ["none", "no_image"],
        }
    )  # fmt: skip


def work_encoded(out: Path, rank: int, world: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    run_study(encoded_study(), out, loader=lambda _: small_vlm())


def kill_and_finish(out: Path, chance: random.Random, at_most: int) -> int:
    """Ask the study in one or two processes that are killed, then to its end; returns the kills."""
    kills = 0
    out.mkdir()
    while kills < at_most:
        world = chance.choice([1, 2])
        enough = written(out) + chance.randrange(1, 9000)
        processes = [FORK.Process(target=work_encoded, args=(out, i, world)) for i in range(world)]
        for process in processes:
            process.start()
        while written(out) < enough and any(process.is_alive() for process in processes):
            time.sleep(0.001)
        if not any(process.is_alive() for process in processes):
            break
        for process in processes:
            kills += process.is_alive()
            process.kill()
            process.join(60)
            assert process.exitcode in (0, -signal.SIGKILL)
    last = FORK.Process(target=work_encoded, args=(out, 0, 1))
    last.start()
    finish([last])
    return kills


def test_killed_while_pictures_are_shared(tmp_path: Path) -> None:
    """A real model in one or two processes, killed: the table is that of a run without a kill.

    Ten kills; ``VISPRUNE_KILLS=100`` in the environment asks for so many, in several folders.
    """
    whole = table(run_study(encoded_study(), tmp_path / "whole", loader=lambda _: small_vlm()))
    assert len(whole) == 5 * 20
    wanted, chance = int(os.environ.get("VISPRUNE_KILLS", "10")), random.Random(0)
    kills = folders = 0
    while kills < (wanted if wanted > 10 else 4):
        out = tmp_path / f"out{folders}"
        kills += kill_and_finish(out, chance, min(10, wanted))
        folders += 1
        folder = ResultsFolder(out)
        counts = Counter((values["cell"], values["sample"]) for values in folder.lines())
        assert set(counts.values()) == {1}, "asked twice"
        assert table(folder) == whole
    print(f"{kills} kills in {folders} folders: the same table each time")
