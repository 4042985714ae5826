# SPDX-License-Identifier: Apache-2.0
"""``visprune.evaluate`` and ``visprune eval``: a study from arguments, run, and its table."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from visprune.core.method import PruningMethod
from visprune.errors import ConfigError
from visprune.eval.environment import set_threads, without_hub
from visprune.eval.models.base import EvalModel, ModelEntry
from visprune.eval.models.names import EMBEDDED
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.records.record import Record, canonical
from visprune.eval.report.failures import commonest_failure
from visprune.eval.run.dry_run import plan_study, print_plan
from visprune.eval.run.jobs import task_at
from visprune.eval.run.progress import Progress, Silent
from visprune.eval.run.runner import process_number, run_study
from visprune.eval.study.grid import Study, build_study, read_study

__all__ = ["Evaluation", "evaluate", "run_command"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Attributes:
        rows: one per method at a budget and task, seeds pooled: ``model``, ``task``, ``label``,
            ``method``, ``num_keep``, ``control``, ``n``, ``errors``, ``score`` with ``low`` and
            ``high`` (95 %), ``delta`` to the untouched model (paired) with ``delta_low`` and
            ``delta_high``, ``tokens`` (mean over layers), ``gflops``, ``kv_bytes``, ``agreement``
            and ``unparsed`` (shares of answers), and ``floors`` without model and picture, by name.
        table: the same as text (Markdown), with everything that was measured.
        folder: the results folder; ``None`` if it was temporary.
        records: every record, where the folder was temporary.
    """

    rows: list[dict[str, Any]]
    table: str
    folder: Path | None = None
    records: list[Record] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return self.table


def evaluate(
    model: Any,
    processor: Any = None,
    *,
    tasks: Sequence[Any] | Any = None,
    methods: Sequence[str | Mapping[str, Any] | PruningMethod] | str | PruningMethod = (),
    budgets: Sequence[Any] = (),
    out: str | Path | None = None,
    limit: int | None = None,
    seeds: Sequence[int] | int = 0,
    controls: bool | Sequence[str] = True,
    batch_size: int | None = None,
    prompt_style: str | None = None,
    generation: Mapping[str, Any] | None = None,
    turns: int | None = None,
    query_aware: bool = True,
    speed: bool | Mapping[str, Any] = False,
    name: str | None = None,
    pad: bool = False,
    engine: str = "transformers",
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model under methods and controls, on the same questions.

    Args:
        model: a loaded transformers vision-language model, a timm vision transformer, or the name
            of a model (see ``visprune eval --help``).
        processor: of a loaded transformers model.
        tasks: names of tasks, mappings with ``task`` and options, or built tasks; ``None``: as of
            a study, a standard set (:data:`visprune.eval.tasks.STANDARD`), the embedded model's own
            questions, or ImageNet.
        methods: names, mappings with ``method`` and parameters, or built methods.
        budgets: of the methods: numbers of tokens, or fractions that stay.
        out: results folder, to be gone on with after a stop; ``None``: a temporary one.
        limit: samples of each task that sets none itself; ``None``: all.
        seeds: of question sets and random draws.
        controls: the untouched model, keep_all, random, uniform, pool and no_image beside the
            methods; or a list of some of them.
        batch_size: samples asked together; ``None``: 1, but 16 of a small model (below 50
            million weights) in single precision on the CPU, and 64 of the engine vllm.
        prompt_style: ``"llava15"``, ``"chat"`` or ``"plain"``; ``None``: as the model likes it.
        generation: options of ``generate`` in place of greedy search.
        turns: questions about one picture that share one cache, see
            :class:`visprune.eval.study.grid.Study`.
        query_aware: methods see the question, see :class:`visprune.eval.study.grid.Study`.
        speed: also measure latency by part: ``True``, or options of
            :class:`visprune.eval.study.grid.SpeedPlan`.
        name: what tables call the model.
        pad: show pictures whole, in squares of the processor's mean colour, as LLaVA's own
            evaluation does.
        engine: of a model by name: ``"transformers"`` or ``"vllm"``, see
            :class:`visprune.eval.models.base.ModelEntry`.
        progress: show bars on the terminal.

    Returns:
        An :class:`Evaluation`.

    Raises:
        ConfigError: a name or value is not allowed, or ``out`` holds another study.

    Example:
        >>> visprune.evaluate(model, processor, tasks=["embedded"], methods=["todre"],
        ...                   budgets=[64], limit=200)  # doctest: +SKIP
    """
    loaded = None if isinstance(model, str) else _loaded(model, processor, name, pad)
    if loaded is not None and engine != "transformers":
        raise ConfigError(
            f"engine={engine!r} starts from a model's files; give the name of a model or its "
            f"folder, not a loaded one."
        )
    spec = ModelEntry(model if isinstance(model, str) else loaded.name if loaded else "", pad=pad,
                      engine=engine)  # fmt: skip
    if tasks is None and loaded is not None:
        tasks = _usual(model, processor)
    study = build_study(
        {
            "models": [spec], "tasks": tasks, "methods": methods, "budgets": budgets,
            "limit": limit, "seeds": seeds, "controls": controls, "batch_size": batch_size,
            "prompt_style": prompt_style, "generation": generation or {},
            "turns": turns, "query_aware": query_aware, "pictures": out is not None,
            "speed": speed,
        }
    )  # fmt: skip
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="visprune-eval-"))
    try:
        with _shown(progress) as bars:
            options: dict[str, Any] = {} if loaded is None else {"loader": lambda _: loaded}
            results = run_study(study, folder, progress=bars, **options)
            _measure(study, results, bars, **options)
        rows, table = summarize(results)
        kept = [] if out is not None else results.records()
        return Evaluation(rows, table, folder if out is not None else None, kept)
    finally:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)


def _loaded(model: Any, processor: Any, name: str | None, pad: bool) -> EvalModel:
    """The loaded model as one that the runner can ask."""
    if processor is not None:
        from visprune.eval.models.vlm import VLM

        return VLM(model, processor, name=name, pad=pad)
    from visprune.eval.models.vit import TimmClassifier

    if pad:
        raise ConfigError("pad is of vision-language models; an image classifier has a transform.")
    return TimmClassifier(model, name=name)


def _usual(model: Any, processor: Any) -> str | None:
    """What a loaded model is asked, where its name alone would not tell; ``None``: it does."""
    if processor is None:
        return "imagenet"
    from visprune.backbones.vlm import embedded  # transformers, which takes its time

    return EMBEDDED if Path(model.config._name_or_path) == embedded.WEIGHTS else None


def _shown(progress: bool) -> Any:
    rank = process_number()[0]
    return Progress(Console(stderr=True)) if progress and rank == 0 else nullcontext(Silent())


def summarize(folder: ResultsFolder) -> tuple[list[dict[str, Any]], str]:
    """Rows for programs and a table for people, from the records alone."""
    from visprune.eval.report.build import build_tables
    from visprune.eval.report.groups import all_averages
    from visprune.eval.report.missing import missing_cells
    from visprune.eval.report.read import read_results
    from visprune.eval.report.tables import floor_list, to_markdown

    read = read_results(folder.path)
    tables = build_tables(read, resamples=1000)
    rows = []
    for table in tables:
        for row in table.rows:
            score, delta = row.score or (None,) * 3, row.delta or (None,) * 3
            flops = row.cost.total_flops
            rows.append(
                {
                    "model": table.model, "task": table.task, "label": row.arm.label,
                    "method": row.arm.method, "num_keep": row.arm.num_keep,
                    "control": row.arm.control, "n": row.n, "errors": sum(row.errors.values()),
                    "score": score[0], "low": score[1], "high": score[2],
                    "delta": delta[0], "delta_low": delta[1], "delta_high": delta[2],
                    "tokens": row.cost.tokens, "gflops": None if flops is None else flops / 1e9,
                    "kv_bytes": row.cost.kv_bytes, "agreement": row.agreement,
                    "unparsed": row.unparsed / row.answered if row.answered else None,
                    "floors": dict(floor_list(table)),
                }
            )  # fmt: skip
    return rows, to_markdown(tables, all_averages(tables), missing_cells(read.empty))


def run_command(
    path: Path | None, out: Path | None, changes: Mapping[str, Any], *,
    dry_run: bool, retry_errors: bool, threads: int | None, answers: Path | None,
) -> None:  # fmt: skip
    """What ``visprune eval`` does: a study of a file, of flags, or of a file changed by flags.

    Raises:
        ConfigError: whatever :func:`run_study` raises.
        SystemExit: with 1, after the table, where not one sample of some row was answered.
    """
    study = build_study(changes) if path is None else read_study(path, changes)
    rank, world, _ = process_number()
    if threads is not None:
        set_threads(threads)
    console = Console()
    if dry_run:
        if rank == 0:
            with without_hub():
                planned = plan_study(study, out)
            print_plan(console, planned, processes=world, timed=study.speed is not None,
                       notes=study.notes)  # fmt: skip
        return
    assert out is not None, "the command line asks for it"
    with _shown(True) as bars:
        folder = run_study(study, out, retry_errors=retry_errors, progress=bars)
        if rank:
            return
        _measure(study, folder, bars)
    rows = summarize(folder)[0]
    print_rows(console, rows)
    if answers is not None:
        _write_answers(console, folder, study, answers)
    failures = commonest_failure(folder)
    if failures is not None:
        console.print(
            f"{failures.text} What failed is asked again with --retry-errors, once it is mended.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(
        f"Records: {folder.path}. A page with charts and pictures: visprune report {folder.path}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if failures is not None and failures.silent:
        raise SystemExit(1)


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what matters of the rows, a table per model and task."""
    for name in dict.fromkeys((row["model"], row["task"]) for row in rows):
        table = Table(box=box.SIMPLE_HEAD, title=f"{name[0]}: {name[1]}", title_justify="left")
        table.add_column("method", overflow="fold")
        for column in ("score", "95 %", "vs untouched", "tokens", "GFLOPs", "KV MiB", "errors"):
            table.add_column(column, justify="right")
        found: Mapping[str, float] = {}
        for row in rows:
            if (row["model"], row["task"]) == name:
                table.add_row(row["label"], *_cells(row))
                found = row["floors"]
        if found:
            text = "; ".join(f"{about} {value:.1f}" for about, value in found.items())
            table.caption, table.caption_justify = f"Without the picture: {text}.", "left"
        Console(width=max(100, console.width), file=console.file).print(table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    def number(key: str, form: str, factor: float = 1.0) -> str:
        return "" if row[key] is None else format(row[key] * factor, form)

    delta = number("delta", "+.1f")
    if delta and row["delta_low"] is not None and math.isfinite(row["delta_low"]):
        delta += f" [{row['delta_low']:+.1f}, {row['delta_high']:+.1f}]"
    low = row["low"]
    between = f"{low:.1f} - {row['high']:.1f}" if low is not None and math.isfinite(low) else ""
    return [
        number("score", ".1f"), between, delta, number("tokens", ".1f"), number("gflops", ".3g"),
        number("kv_bytes", ".2f", 2**-20), str(row["errors"]),
    ]  # fmt: skip


def _measure(study: Study, folder: ResultsFolder, bars: Silent, **options: Any) -> None:
    if study.speed is None:
        return
    from visprune.eval.speed.measure import measure_study

    measure_study(study, folder, progress=bars, **options)


def _write_answers(console: Console, folder: ResultsFolder, study: Study, target: Path) -> None:
    """LLaVA's answer files, one per cell of the study."""
    from visprune.eval.environment import writable_folder
    from visprune.eval.llava_files import write_answers

    writable_folder(target)
    tasks = {
        canonical(seeded.to_dict()): seeded
        for task in study.tasks
        for seeded in (task_at(task, seed) for seed in study.seeds)
    }
    short = 0
    for cell in folder.cells().values():
        task = tasks.get(canonical(cell.task))
        records = folder.records(cell.id) if task is not None else []
        name = f"{cell.task['task']} {cell.label} seed {cell.seed} {cell.id[:6]}.jsonl"
        name = name.replace(" ", "_").replace("/", "_").replace("%", "percent")
        if records:
            model = f"{cell.model['name']} {cell.label}"
            short += write_answers(target / name, records, model, task) < len(records)
    if short:
        console.print(
            f"In {short} of the files in {target}, samples that failed have no line: scorers that "
            f"pair answers with labels by their line cannot take them.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
