# SPDX-License-Identifier: Apache-2.0
"""From outcomes to tables: which of them make one row, and which rows one table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from visprune.eval.report.estimate import Draws, Scorer
from visprune.eval.report.floors import pooled_floors
from visprune.eval.report.front import pareto
from visprune.eval.report.read import UNTOUCHED, Line, Outcome, Results, canonical
from visprune.eval.report.rows import Arm, Row, Table, build_row
from visprune.eval.tasks.base import tasks as registry

__all__ = ["arm_label", "arm_of", "build_tables"]

_KINDS = 24  # columns of a breakdown; what is rarer goes into one more


def build_tables(results: Results, *, resamples: int, seed: int = 0) -> list[Table]:
    """Return one table for each model and task, in the order in which they come."""
    models = _titles([outcome.cell.model for outcome in results.outcomes], "name")
    tasks = _titles([_setting(outcome) for outcome in results.outcomes], "task", said=_said)
    settings: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in results.outcomes:
        by_model = settings.setdefault(canonical(_setting(outcome)), {})
        by_model.setdefault(models[canonical(outcome.cell.model)], []).append(outcome)
    tables = []
    for by_model in settings.values():
        outcomes = [outcome for group in by_model.values() for outcome in group]
        draws = Draws(
            [line.cluster for outcome in outcomes for line in outcome.lines.values()],
            resamples=resamples, seed=seed,
        )  # fmt: skip
        for model, group in by_model.items():
            table = _table(model, tasks[canonical(_setting(group[0]))], group, draws)
            table.notes.extend(_versions(group, results.environments))
            tables.append(table)
    order = list(dict.fromkeys(table.task for table in tables))
    names = list(models.values())
    return sorted(tables, key=lambda table: (names.index(table.model), order.index(table.task)))


def _task(outcome: Outcome) -> dict[str, Any]:
    """The task and how it was put, without the seed: seeds are pooled."""
    task = {name: value for name, value in outcome.cell.task.items() if name != "seed"}
    return {**task, "prompt_style": outcome.cell.prompt_style}


def _setting(outcome: Outcome) -> dict[str, Any]:
    """The task, and how its answers are generated: what one table holds."""
    generation = {f"generation.{name}": value for name, value in outcome.cell.generation.items()}
    return {**_task(outcome), **generation}


def _said(about: Mapping[str, Any]) -> list[str]:
    """Options of a task that its title says even where it has no namesake: those not usual.

    TextVQA with OCR tokens is another benchmark than without. Where the data lies, and how much of
    it was taken, stands elsewhere.
    """
    name = str(about.get("task"))
    if name not in registry:
        return []
    fields = dataclasses.fields(registry.get(name))
    usual = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return [
        field for field, default in usual.items()
        if field in about and field not in _ELSEWHERE
        and canonical(about[field]) != canonical(default)
    ]  # fmt: skip


_ELSEWHERE = ("seed", "limit", "data", "path", "metric_name", "per_kind")


def _titles(
    abouts: Sequence[Mapping[str, Any]],
    name: str,
    said: Callable[[Mapping[str, Any]], list[str]] = lambda about: [],
) -> dict[str, str]:
    """Return a title for each distinct description: its name, and what tells it from namesakes.

    Args:
        abouts: the descriptions.
        name: the field that holds the name.
        said: fields that a title says in any case.
    """
    distinct = {canonical(about): about for about in abouts}
    titles = {}
    for key, about in distinct.items():
        same = [other for other in distinct.values() if other.get(name) == about.get(name)]
        fields = {field for other in same for field in other}
        values = {
            field: len({canonical(other.get(field)) for other in same})
            for field in sorted(fields, key=lambda field: (field != "path", field))
        }
        # One field that tells all of them apart is enough: titles head columns.
        alone = [field for field, count in values.items() if 1 < count == len(same)][:1]
        differ = alone or [field for field, count in values.items() if count > 1]
        stated = dict.fromkeys((*said(about), *differ))
        words = [f"{field}={about.get(field)}" for field in stated]
        titles[key] = " ".join([str(about.get(name)), *words])
    return titles


def arm_label(label: str) -> str:
    """What tables call a method, by its label in the cells."""
    return "untouched" if label == UNTOUCHED else label


def arm_of(outcome: Outcome, model: str) -> Arm:
    """Return the arm of an outcome; outcomes that differ in their seed alone share it."""
    parameters = {k: v for k, v in outcome.cell.method.items() if k not in ("method", "seed")}
    label = outcome.cell.label or outcome.method
    return Arm(
        model=model,
        label=arm_label(label),
        method=outcome.method,
        num_keep=outcome.cell.num_keep,
        control=bool(outcome.cell.control),
        parameters=canonical(parameters),
    )


def _table(model: str, title: str, outcomes: Sequence[Outcome], draws: Draws) -> Table:
    scorer = Scorer(outcomes[0].cell.task, draws, list(outcomes[0].lines.values()))
    arms: dict[Arm, list[Outcome]] = {}
    for outcome in outcomes:
        arms.setdefault(arm_of(outcome, model), []).append(outcome)
    whole: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.method == UNTOUCHED:
            whole.setdefault(outcome.task, []).append(outcome)
    samples = _samples(outcomes)
    kinds = dict(Counter(line.kind for line in samples.values()).most_common())
    shown = list(kinds)[:_KINDS] if len(kinds) > 1 else []
    rows = [build_row(arm, group, whole, scorer, shown) for arm, group in arms.items()]
    pareto(rows)
    about = {name: value for name, value in outcomes[0].cell.task.items() if name != "seed"}
    return Table(
        model=model, task=title, about=about, prompt_style=outcomes[0].cell.prompt_style,
        metric=getattr(scorer.task, "metric_name", "score"),
        unit=getattr(scorer.task, "unit", "%"),
        mean=scorer.mean, rows=rows, samples=len(samples),
        pictures=len({line.cluster for line in samples.values()}), kinds=kinds,
        floors=pooled_floors(scorer.task, _by_seed(samples)),
        notes=_notes(rows, scorer, whole, samples),
    )  # fmt: skip


def _samples(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Line]:
    """Return a line of each sample of each seed: one without an error, where there is one."""
    found: dict[tuple[str, str], Line] = {}
    for outcome in outcomes:
        for name, line in outcome.lines.items():
            held = found.setdefault((outcome.task, name), line)
            if held.error is not None and line.error is None:
                found[outcome.task, name] = line
    return found


def _by_seed(samples: Mapping[tuple[str, str], Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for (task, _), line in samples.items():
        found.setdefault(task, []).append(line)
    return found


def _notes(
    rows: Sequence[Row],
    scorer: Scorer,
    whole: Mapping[str, Sequence[Outcome]],
    samples: Mapping[Any, Line],
) -> list[str]:
    notes = [scorer.problem] if scorer.problem else []
    if not whole:
        notes.append("No untouched run of this model and task: there is nothing to compare with.")
    asked = {row.arm.label: row.n / len(row.seeds) for row in rows}
    most = max(asked.values())
    short = [f"{label} ({n:g})" for label, n in asked.items() if n < most]
    if short:
        notes.append(f"Incomplete, fewer than {most:g} samples: {', '.join(short)}.")
    notes += _unseen(samples.values())
    long = sum(line.beyond for row in rows for o in row.outcomes for line in o.lines.values())
    if long:
        notes.append(
            f"{long} of {sum(row.n for row in rows)} answers are to questions longer than the "
            f"positions that the model was made for: such answers get worse. Samples are marked."
        )
    pictures = len({line.cluster for line in samples.values()})
    if pictures < 30:
        notes.append(
            f"Few pictures ({pictures}): a bootstrap interval is then too narrow."
            if pictures > 1 else "One picture: there is no interval."
        )  # fmt: skip
    return notes


def _unseen(lines: Iterable[Line]) -> list[str]:
    """A remark where pictures were cut or squeezed before the model saw them."""
    views = {line.cluster: line for line in lines}
    cut = [line.seen for line in views.values() if line.seen < 0.995]
    out = [line.squeezed for line in views.values() if line.squeezed > 1.0]
    said = []
    if cut:
        said.append(f"{len(cut)} cut to the middle (up to {1 - min(cut):.0%} of one is not seen)")
    if out:
        said.append(f"{len(out)} squeezed (by up to {max(out):.2g})")
    if not said:
        return []
    return [f"Of {len(views)} pictures the model saw {' and '.join(said)}; samples show where."]


def _versions(
    outcomes: Sequence[Outcome], environments: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A remark where a table's answers were made by several versions of a library."""
    used = {line.env for outcome in outcomes for line in outcome.lines.values()}
    known = [environments[name].get("versions") or {} for name in sorted(used & {*environments})]
    found = []
    for library in ("torch", "transformers", "timm", "open_clip_torch", "visprune"):
        versions = sorted({str(of[library]) for of in known if library in of})
        if len(versions) > 1:
            found.append(f"{library} {', '.join(versions)}")
    if not found:
        return []
    return [
        f"Answers of several versions stand beside each other ({'; '.join(found)}): differences "
        f"between rows may be theirs. A new folder asks everything again."
    ]
