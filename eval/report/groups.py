# SPDX-License-Identifier: Apache-2.0
"""Averages of tasks of a kind, told apart from the average over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visprune.eval.report.average import averages
from visprune.eval.report.rows import Table
from visprune.eval.tasks.base import tasks

__all__ = ["all_averages"]


def all_averages(tables: Sequence[Table]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the averages of each model over all its tasks, and over each group of them.

    Reading and grounding are lost long before the rest is (a token holds the one word that was
    asked for), which an average over all tasks hides.

    Args:
        tables: of all models.

    Returns:
        Rows of :func:`averages` by model and group (``""``: all tasks); a group of one task, and
        one that holds all of a model's tasks, has none.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for model in dict.fromkeys(table.model for table in tables):
        mine = [table for table in tables if table.model == model]
        groups: dict[str, list[Table]] = {}
        for table in mine:
            groups.setdefault(_group(table.about), []).append(table)
        found[model, ""] = averages(mine)
        found |= {
            (model, group): averages(some)
            for group, some in groups.items()
            if group and len(some) < len(mine)
        }
    return {name: rows for name, rows in found.items() if rows}


def _group(about: Mapping[str, Any]) -> str:
    name = str(about.get("task"))
    return str(tasks.get(name).GROUP) if name in tasks else ""
