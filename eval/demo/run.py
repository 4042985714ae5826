# SPDX-License-Identifier: Apache-2.0
"""`visprune demo`: one model, several methods and budgets: accuracy, operations, time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from visprune.backbones.hf.cache import cache_of
from visprune.catalog import get_method
from visprune.core.method import PruningMethod
from visprune.eval.demo.accuracy import Answers, QuestionSet
from visprune.eval.demo.report import BASELINE, Entry, Measured, build_rows, draw_sheet, report
from visprune.eval.environment import quiet_loading, set_threads, writable_folder
from visprune.eval.speed.latency import Case, interleaved
from visprune.eval.tasks import embedded as questions
from visprune.machine.run import prune

__all__ = ["BUDGETS", "METHODS", "Plan", "run_demo"]

METHODS = ("random", "pool", "todre", "divprune", "fastv")
BUDGETS = (192, 128, 64, 32)
QUESTIONS = 504
_SEED = 0


@dataclass(frozen=True)
class Plan:
    """What the demo runs.

    Attributes:
        methods: beside keep_all.
        budgets: tokens kept.
        limit: questions.
        prompts: prompts that are timed under each method.
    """

    methods: Sequence[str] = METHODS
    budgets: Sequence[int] = BUDGETS
    limit: int = QUESTIONS
    prompts: int = 20


def run_demo(
    out: str | Path,
    limit: int | None = None,
    threads: int | None = None,
    *,
    plan: Plan | None = None,
    model: tuple[Any, Any] | None = None,
) -> list[dict[str, Any]]:
    """Compare methods and budgets on the embedded model; print a table, write files into ``out``.

    ``demo.json`` and ``demo.csv`` (the rows), ``accuracy_flops.png``, ``contact_sheet.png`` and
    ``run.json`` (command, hardware, versions, seeds, blind floor, the untouched model's time).

    Args:
        out: folder to write into; made if it is not there.
        limit: questions to ask; ``None``: 504, as many of each kind as pictures allow.
        threads: CPU threads; ``None``: two, or one where there is one.
        plan: other methods and budgets.
        model: another (model, processor) of the embedded model's shape.

    Returns:
        The rows of ``demo.json``.

    Raises:
        ConfigError: ``out`` cannot be written, a number is out of range, or there are no weights.
    """
    folder = writable_folder(out)
    plan = plan or Plan()
    plan = replace(plan, limit=limit) if limit is not None else plan
    before = torch.get_num_threads()
    try:
        set_threads(threads)
        return _run(folder, plan, model or _embedded())
    finally:
        torch.set_num_threads(before)


def _embedded() -> tuple[Any, Any]:
    from visprune.backbones.vlm import embedded

    with quiet_loading():
        return embedded.load()


def _run(folder: Path, plan: Plan, loaded: tuple[Any, Any]) -> list[dict[str, Any]]:
    model, processor = loaded
    console = Console()
    entries = [Entry(get_method("keep_all"), model.config.image_seq_length)]
    for name in plan.methods:
        seed = {"seed": _SEED} if name == "random" else {}
        entries += [Entry(get_method(name, num_keep=k, **seed), k) for k in plan.budgets]
    with _progress(console) as bars:
        asked = QuestionSet(model, processor, questions.load("test", plan.limit))
        steps = bars.add_task("pictures through the vision tower", total=len(asked.pictures))
        asked.encode(lambda count: bars.advance(steps, count))
        answers = _accuracy(asked, entries, bars)
        measured = _latency(asked, entries, plan, bars)
        steps = bars.add_task("contact sheet", total=len(entries))
        draw_sheet(folder, asked, entries, answers, lambda: bars.advance(steps))
    rows = build_rows(asked, entries, answers, measured, seed=_SEED)
    report(console, folder, asked, rows, measured, seed=_SEED)
    return rows


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _accuracy(asked: QuestionSet, entries: list[Entry], bars: Progress) -> dict[str, Answers]:
    bar = bars.add_task("questions", total=len(asked.prompts) * len(entries))
    answers = {}
    for entry in entries:
        bars.update(bar, description=f"questions: {entry.method.name} {entry.num_keep}")
        with prune(asked.model, entry.method) as run:
            answers[entry.key] = asked.ask(run, lambda count: bars.advance(bar, count))
    bars.update(bar, description="questions")
    return answers


@torch.inference_mode()
def _latency(asked: QuestionSet, entries: list[Entry], plan: Plan, bars: Progress) -> Measured:
    """Time the prefill of single prompts, picture included, methods taking turns."""
    number = min(plan.prompts, len(asked.prompts))
    chosen = np.linspace(0, len(asked.prompts) - 1, number).round().astype(int).tolist()
    inputs = [asked.single(i) for i in chosen]

    def prefill(turn: int) -> Any:
        return asked.model(**inputs[turn], logits_to_keep=1)

    cases = [Case(BASELINE, prefill)]
    cases += [Case(entry.key, prefill, _attached(asked.model, entry.method)) for entry in entries]
    bar = bars.add_task("prefill times, taking turns", total=len(cases) * (number + 1))
    stored: dict[str, list[int]] = {case.name: [] for case in cases}
    logits: dict[tuple[str, int], torch.Tensor] = {}

    def after(case: Case, turn: int, output: Any) -> None:
        bars.advance(bar)
        if turn >= 0:
            layers = cache_of(output).layers
            stored[case.name].append(sum(x.keys.nbytes + x.values.nbytes for x in layers))
            if case.name in (BASELINE, entries[0].key):
                logits[case.name, turn] = output.logits

    device = next(asked.model.parameters()).device
    timings = interleaved(cases, rounds=number, device=device, after=after)
    same = (
        torch.equal(logits[BASELINE, turn], logits[entries[0].key, turn]) for turn in range(number)
    )
    return Measured(timings, stored, number, keep_all_exact=all(same))


def _attached(model: Any, method: PruningMethod) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: prune(model, method)
