# SPDX-License-Identifier: Apache-2.0
"""``visprune eval`` and ``visprune compare``."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from visprune.cli.checks import check_study
from visprune.cli.words import overrides_of
from visprune.eval.study.options import FLAGS, Options

__all__ = ["compare", "evaluate"]


def with_study_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of a study, in place of its ``**flags``."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=Annotated[flag.kind | None, typer.Option(help=flag.help, **flag.more)],
        )
        for name, flag in FLAGS.items()
    ]  # fmt: skip
    first, *rest = own  # the study's file; what is done with it stands behind what it is
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[first, *flags, *rest]
    )
    return command


@with_study_flags
def evaluate(
    study: Annotated[
        Path | None, typer.Argument(help="A study, such as configs/studies/NAME.yaml.")
    ] = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Results folder; run again to go on.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="List what would run, with an estimate; downloads nothing.")
    ] = False,
    retry_errors: Annotated[bool, typer.Option(help="Ask again where an error was.")] = False,
    answers: Annotated[
        Path | None, typer.Option(help="Folder for answer files in LLaVA's format.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    **flags: Any,
) -> None:
    """Evaluate models under methods and budgets.

    Flags make a study, or change that of a file: they win over it.
    """
    changes = changes_of(flags)
    check_study(study, changes, out, dry_run=dry_run)
    # Read once, when PyTorch's OpenMP loads; see `demo`.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from visprune.eval.evaluate import run_command

    run_command(
        study, out, changes, dry_run=dry_run, retry_errors=retry_errors, threads=threads,
        answers=answers,
    )  # fmt: skip


def changes_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what flags say as keys of a study, for :func:`visprune.eval.study.grid.read_study`.

    Args:
        given: by name of the flag; ``None`` or an empty list: not given.

    Raises:
        ConfigError: something that should be KEY=VALUE is not.
    """
    given = {name: value for name, value in given.items() if value not in (None, [])}
    changes: dict[str, Any] = {}
    for key in dataclasses.fields(Options):
        flags = [name for name in key.metadata["flags"] if name in given]
        if key.name in _READ:
            changes |= _READ[key.name]({name: given[name] for name in flags})
        elif flags:
            changes[key.name] = given[flags[0]]
    return {key: value for key, value in changes.items() if value not in ([], {})}


def _models(given: dict[str, Any]) -> dict[str, Any]:
    names = given.pop("model", [])
    if "engine_option" in given:
        given["engine_options"] = overrides_of(given.pop("engine_option"))
    return {
        "models": [{"name": name, **given} for name in names],
        "model_options": {} if names else given,
    }


def _tasks(given: dict[str, Any]) -> dict[str, Any]:
    names, options = given.get("task", []), overrides_of(given.get("task_option", []))
    return {
        "tasks": [{"task": name, **options} for name in names],
        "task_options": {} if names else options,
    }


def _methods(given: dict[str, Any]) -> dict[str, Any]:
    return {"methods": [_method(text) for text in given.get("method", [])]}


def _method(text: str) -> str | dict[str, Any]:
    """``"tome,r=13"`` as ``{"method": "tome", "r": 13}``; a name alone stays one."""
    name, *pairs = re.split(r",(?![^\[{]*[\]}])", text)  # lists and mappings stay whole
    return {"method": name, **overrides_of(pairs)} if pairs else name


def _budgets(given: dict[str, list[Any]]) -> dict[str, Any]:
    """Numbers and fractions as they are, others by name."""
    plain = ("num_keep", "keep_ratio")
    found = [x if name in plain else {name: x} for name, values in given.items() for x in values]
    return {"budgets": found}


# Where flags are not simply the value of their key.
_READ = {
    "models": _models,
    "tasks": _tasks,
    "methods": _methods,
    "budgets": _budgets,
    "generation": lambda given: {"generation": given},
}


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
