# SPDX-License-Identifier: Apache-2.0
"""``visprune eval`` and ``visprune compare``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from visprune.cli.checks import check_study
from visprune.cli.words import overrides_of

__all__ = ["compare", "evaluate"]


def evaluate(
    study: Annotated[
        Path | None, typer.Argument(help="A study, such as configs/studies/NAME.yaml.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder; run again to go on.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="embedded, a folder, a name on the Hub, timm:NAME or open_clip:NAME/PRETRAINED."
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A name from `visprune tasks`; repeat.")
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of every task; repeat.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,KEY=VALUE...]",
            help="A name from `visprune methods`, with parameters (tome,r=13); repeat.",
        ),
    ] = None,
    num_keep: Annotated[
        list[int] | None, typer.Option(min=1, help="Visual tokens to keep; repeat.")
    ] = None,
    keep_ratio: Annotated[
        list[float] | None, typer.Option(help="Fraction of tokens to keep; repeat.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task, whatever the study says.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Seed; repeat.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples asked together.")] = None,
    controls: Annotated[
        bool | None,
        typer.Option(
            help="Also run the untouched model, keep_all, random, uniform, pool, no_image.",
            show_default="controls",
        ),
    ] = None,
    speed: Annotated[
        bool | None, typer.Option(help="Measure latency by part.", show_default="no-speed")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of every model, whatever the study says.", show_default="auto"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Of every model, whatever the study says.", show_default="auto"),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention of every model: sdpa, eager ...")
    ] = None,
    prompt_style: Annotated[str | None, typer.Option(help="llava15, chat or plain.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.", show_default="the task's")
    ] = None,
    pictures: Annotated[
        bool | None, typer.Option(help="Keep small copies of pictures.", show_default="pictures")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="List what would run, with an estimate; downloads nothing.")
    ] = False,
    retry_errors: Annotated[bool, typer.Option(help="Ask again where an error was.")] = False,
    answers: Annotated[
        Path | None, typer.Option(help="Folder for answer files in LLaVA's format.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Evaluate models under methods and budgets.

    Flags make a study, or change that of a file: they win over it.
    """
    options = overrides_of(task_option or [])
    of_models = {"dtype": dtype, "device": device, "attention": attention}
    of_models = {key: value for key, value in of_models.items() if value is not None}
    changes: dict[str, Any] = {
        "models": [{"name": name, **of_models} for name in model or []],
        "model_options": {} if model else of_models,
        "task_options": {} if task else options,
        "tasks": [{"task": name, **options} for name in task or []],
        "methods": [_method(text) for text in method or []],
        "budgets": [*(num_keep or []), *(keep_ratio or [])],
        "limit": limit,
        "seeds": seed,
        "batch_size": batch_size,
        "controls": controls,
        "speed": speed,
        "prompt_style": prompt_style,
        "generation": {"max_new_tokens": max_new_tokens} if max_new_tokens else None,
        "pictures": pictures,
    }
    changes = {key: value for key, value in changes.items() if value not in (None, [], {})}
    check_study(study, changes)
    # Read once, when PyTorch's OpenMP loads; see `demo`.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from visprune.eval.evaluate import run_command

    run_command(
        study, out, changes, dry_run=dry_run, retry_errors=retry_errors, threads=threads,
        answers=answers,
    )  # fmt: skip


def _method(text: str) -> str | dict[str, Any]:
    """``"tome,r=13"`` as ``{"method": "tome", "r": 13}``; a name alone stays one."""
    name, *pairs = re.split(r",(?![^\[{]*[\]}])", text)  # lists and mappings stay whole
    return {"method": name, **overrides_of(pairs)} if pairs else name


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="RESULTS, or RESULTS:METHOD.")],
    second: Annotated[str, typer.Argument(metavar="B", help="RESULTS, or RESULTS:METHOD.")],
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap.")] = 10_000,
) -> None:
    """Compare two runs on the questions both answered: paired bootstrap and McNemar's test.

    METHOD is what the tables call it, such as "todre 64".
    """
    from visprune.eval.records.place import check_results, named_arm

    for text in (first, second):
        check_results(named_arm(text)[0])
    from visprune.eval.report.compare import compare as run_comparison
    from visprune.eval.report.compare import to_text

    typer.echo(to_text(run_comparison(first, second, resamples=resamples)))
