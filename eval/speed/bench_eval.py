# SPDX-License-Identifier: Apache-2.0
"""`visprune bench eval`: questions a second through the evaluator, beside a plain loop.

The embedded model, its test questions, the demo's methods. Every case writes its records into a
folder of its own; that all give the same answers is checked before a rate is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from visprune.errors import VispruneError
from visprune.eval.environment import describe, describe_line, set_threads, writable_folder
from visprune.eval.models.base import ModelEntry, Request
from visprune.eval.models.load import load_model
from visprune.eval.models.names import EMBEDDED
from visprune.eval.run.runner import run_study
from visprune.eval.speed.latency import Case, interleaved
from visprune.eval.study.grid import Study, build_study

__all__ = ["main", "measure"]

METHODS = ("todre", "divprune", "fastv", "random")
BATCHES = (1, 32)
PLAIN = "a plain loop"
Answers = Mapping[tuple[str, str], str]  # by method and sample


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the options say; print a table, write CSV and JSON."""
    options = _parser().parse_args(argv)
    before = torch.get_num_threads()
    try:
        set_threads(options.threads)
        rows = measure(options.limit, options.batches, rounds=options.rounds)
        _report(rows, options)
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("visprune bench eval", description=__doc__.split("\n")[0])
    made.add_argument("--limit", type=int, default=140, help="questions of each method")
    made.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    made.add_argument("--rounds", type=int, default=3, help="timed runs of each case")
    made.add_argument("--threads", type=int, default=None, help="CPU threads (default: two)")
    made.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for the results")
    return made


def measure(limit: int, batches: Sequence[int], *, rounds: int) -> list[dict[str, Any]]:
    """Time studies of so many questions at several sizes of batches, beside a plain loop.

    The loop has the model, the methods and the prompts, and nothing else: each question goes
    through the processor and ``generate`` with its picture, one by one.

    Returns:
        One row a case: ``case``, ``answers``, ``seconds`` (median), ``rate`` (answers a second).

    Raises:
        VispruneError: two cases answer differently.
    """
    model: Any = load_model(ModelEntry(EMBEDDED, dtype="float32", device="cpu"))
    studies = {size: _study(limit, size) for size in batches}
    cases = [Case(PLAIN, lambda turn: _loop(model, studies[batches[0]]))]
    cases += [Case(f"batch {size}", _runner(model, study)) for size, study in studies.items()]
    told: dict[str, Answers] = {}

    def compare(case: Case, turn: int, answers: Answers) -> None:
        first = told.setdefault("first", answers)  # of whichever case runs first
        if answers != first:
            differ = sum(answers[key] != first[key] for key in first)
            raise VispruneError(
                f"The loop and the evaluator answer {differ} questions differently, or two batches "
                f"do ({case.name}); no rates."
            )

    timings = interleaved(cases, rounds=rounds, warmup=1, after=compare)
    count = len(next(iter(told.values())))
    rows = []
    for case in cases:
        seconds = timings.median_ms(case.name) / 1e3
        rows.append({"case": case.name, "answers": count, "seconds": round(seconds, 3),
                     "rate": round(count / seconds, 2)})  # fmt: skip
    return rows


def _study(limit: int, batch_size: int) -> Study:
    return build_study(
        {
            "name": "rates", "models": [EMBEDDED], "tasks": [EMBEDDED], "limit": limit,
            "methods": list(METHODS), "budgets": [64], "controls": ["none"],
            "batch_size": batch_size, "pictures": False,
        }
    )  # fmt: skip


def _run(model: Any, study: Study) -> Answers:
    """The study from its first question on, records written, as `visprune eval` does it."""
    with tempfile.TemporaryDirectory(prefix="visprune-bench-") as folder:
        results = run_study(study, folder, loader=lambda spec: model)
        labels = {name: cell.label for name, cell in results.cells().items()}
        return {(labels[r.cell], r.sample): r.text or "" for r in results.records()}


def _runner(model: Any, study: Study) -> Callable[[int], Answers]:
    return lambda turn: _run(model, study)


def _loop(model: Any, study: Study) -> Answers:
    """The same questions without an evaluator."""
    (task,) = study.tasks
    samples = task.samples()
    found = {}
    for variant in study.variants:
        generation = model.generation(task, {})
        with model.answering(variant.at(0), task, model.style, generation) as answer:
            for sample in samples:
                prompt = task.prompt(sample, model.style)
                # Without a digest nothing is known of the picture: it is prepared and encoded anew.
                (output,) = answer([Request(sample, prompt, sample.image())])
                found[variant.label, sample.id] = output.text
    return found


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    folder = writable_folder(options.out)
    environment, console = describe(), Console()
    table = Table(title="Answers a second, embedded model", title_justify="left")
    for head in ("case", "answers", "seconds", "answers a second", "of the loop"):
        table.add_column(head, justify="left" if head == "case" else "right")
    for row in rows:
        table.add_row(row["case"], str(row["answers"]), f"{row['seconds']:.1f}",
                      f"{row['rate']:.1f}", f"{row['rate'] / rows[0]['rate']:.2f}x")  # fmt: skip
    console.print(table)
    console.print(f"Same answers in every case: checked. {describe_line(environment)}",
                  soft_wrap=True, highlight=False, markup=False)  # fmt: skip
    settings = {"limit": options.limit, "rounds": options.rounds, "methods": list(METHODS)}
    record = {**environment, "settings": settings, "rows": rows}
    (folder / "eval.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with (folder / "eval.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    console.print(f"Written: {folder / 'eval'}.json, .csv", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
