# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: the data as JSON, the pictures inside it, our own small script.

Nothing is fetched: a content security policy forbids it and allows this very script alone. All text
of models and data sets travels as JSON and is set by ``textContent``, never as markup.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import visprune
from visprune.eval.records.record import Cell
from visprune.eval.report.efficiency import AXES, FLOP_PARTS, TIME_PARTS
from visprune.eval.report.formats import html_json, rounded
from visprune.eval.report.read import Outcome, Results
from visprune.eval.report.rows import Arm, Figure, Row, Table
from visprune.eval.report.samples import Chosen, choose, pictures, read_samples
from visprune.eval.report.tables import FLOORS, HOW_TO_READ

__all__ = ["build_page", "payload"]

_STYLES = ("theme", "page", "charts", "tables", "samples", "narrow")
_SCRIPTS = ("base", "tip", "chart", "plots", "columns", "table", "breakdown", "filters",
            "samples", "shots",
            "details", "main")  # fmt: skip


def build_page(data: Mapping[str, Any]) -> str:
    """Return the page for the data of :func:`payload`."""
    template = _asset("page.html")
    style = "\n".join(_asset(f"{name}.css") for name in _STYLES)
    scripts = (_asset(f"{name}.js") for name in _SCRIPTS)
    script = "\n".join(['(() => {\n"use strict";', *scripts, "})();\n"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
        f"'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(str(data["title"])),
        "STYLE": style,
        "DATA": html_json(data),
        "SCRIPT": script,
    }
    # One pass over the template: what the data holds is never read for marks.
    return re.sub(r"%%([A-Z]+)%%", lambda mark: parts[mark[1]], template)


def _asset(name: str) -> str:
    return (files("visprune.eval.report") / "assets" / name).read_text(encoding="utf-8")


def payload(
    results: Results, tables: Sequence[Table],
    averages: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    published: Sequence[Mapping[str, Any]], *, samples: int, resamples: int, made: str,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that the page shows, as JSON values.

    Args:
        results: the folder.
        tables: of all models and tasks.
        averages: by model and group of tasks.
        published: numbers from papers.
        samples: how many samples of each task the browser shows.
        resamples: of the bootstrap.
        made: date of the report.
    """
    arms = list(dict.fromkeys(row.arm for table in tables for row in table.rows))
    number = {arm: place for place, arm in enumerate(arms)}
    chosen, shown = _samples(results, tables, number, samples)
    return {
        "title": str(results.study.get("name") or results.folder.path.resolve().name),
        "made": made,
        "visprune": visprune.__version__,
        "resamples": resamples,
        "how": HOW_TO_READ,
        "how_floors": FLOORS,
        "flop_parts": FLOP_PARTS,
        "time_parts": TIME_PARTS,
        "arms": [dataclasses.asdict(arm) | {"untouched": arm.untouched} for arm in arms],
        "tables": [_table(table, number) for table in tables],
        "averages": [
            {"model": model, "group": group, "rows": [_average(row, number) for row in rows]}
            for (model, group), rows in averages.items()
        ],
        "chosen": chosen,
        "samples": shown,
        "pictures": pictures(results, shown),
        "published": list(published),
        "environments": list(results.environments.values()),
        "models": _models(tables),
        "study": dict(results.study),
        "empty": [_empty(cell) for cell in results.empty],
    }  # fmt: skip


def _samples(
    results: Results, tables: Sequence[Table], number: Mapping[Arm, int], limit: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Choose the samples of every task and read them: what was chosen, and the samples."""
    outcomes: dict[str, list[Outcome]] = {}
    arms: dict[str, int] = {}
    for table in tables:
        for row in table.rows:
            outcomes.setdefault(table.task, []).extend(row.outcomes)
            arms |= {outcome.cell.id: number[row.arm] for outcome in row.outcomes}
    chosen = [choose(task, group, limit) for task, group in outcomes.items()]
    return [_chosen(group) for group in chosen], read_samples(results, chosen, arms)


def _empty(cell: Cell) -> dict[str, Any]:
    model, task = str(cell.model.get("name")), str(cell.task.get("task"))
    return {"label": cell.label, "model": model, "task": task, "refused": cell.refused}


def _chosen(group: Chosen) -> dict[str, Any]:
    shown = len(group.names)
    return {"task": group.task, "shown": shown, "of": group.of, "failed": group.failed,
            "disagree": group.disagree}  # fmt: skip


def _models(tables: Sequence[Table]) -> list[dict[str, Any]]:
    found: dict[str, Any] = {}
    for table in tables:
        found.setdefault(table.model, dict(table.rows[0].outcomes[0].cell.model))
    return [{"title": title, "about": about} for title, about in found.items()]


def _figure(value: Figure | None) -> list[float | None] | None:
    return None if value is None else [rounded(x) for x in value]


def _table(table: Table, number: Mapping[Arm, int]) -> dict[str, Any]:
    return {
        "model": table.model, "task": table.task, "about": dict(table.about),
        "prompt_style": table.prompt_style, "metric": table.metric, "unit": table.unit,
        "mean": table.mean, "samples": table.samples, "pictures": table.pictures,
        "kinds": table.kinds, "floors": _floors(table), "notes": table.notes,
        "rows": [_row(row, number) for row in table.rows],
    }  # fmt: skip


def _floors(table: Table) -> dict[str, Any] | None:
    if table.floors is None:
        return None
    values = dataclasses.asdict(table.floors)
    return {k: v if isinstance(v, str) else rounded(v) for k, v in values.items()}


def _row(row: Row, number: Mapping[Arm, int]) -> dict[str, Any]:
    cost = row.cost
    return {
        "arm": number[row.arm], "seeds": row.seeds, "n": row.n, "pictures": row.pictures,
        "score": _figure(row.score), "delta": _figure(row.delta), "paired": row.paired,
        "errors_wrong": rounded(row.score_errors_wrong), "agreement": rounded(row.agreement),
        "answered": row.answered, "errors": row.errors, "unparsed": row.unparsed,
        "yes": rounded(row.yes_rate), "yes_wanted": rounded(row.yes_wanted),
        "spread": rounded(row.spread),
        "figures": {name: rounded(value) for name, value in row.figures.items()},
        "cost": {axis: rounded(cost.on(axis)) for axis in AXES},
        "flops": {part: rounded(value) for part, value in cost.flops.items()},
        "new_tokens": rounded(cost.new_tokens),
        "peak": rounded(cost.peak_bytes),
        "speed": {
            batch: {part: [rounded(x) for x in ends] for part, ends in parts.items()}
            for batch, parts in cost.speed.items()
        },
        "measured": dict(cost.measured),
        "kinds": {
            kind: {"n": found["n"], "score": _figure(found["score"]),
                   "delta": _figure(found["delta"])}
            for kind, found in row.kinds.items()
        },
        "pareto": row.pareto,
        "published": row.published,
        "cells": [outcome.cell.id for outcome in row.outcomes],
    }  # fmt: skip


def _average(row: Mapping[str, Any], number: Mapping[Arm, int]) -> dict[str, Any]:
    return {
        "arm": number[row["arm"]], "score": _figure(row["score"]), "delta": _figure(row["delta"]),
        "cost": {axis: rounded(value) for axis, value in row["cost"].items()},
        "pareto": row["pareto"],
    }  # fmt: skip
