# SPDX-License-Identifier: Apache-2.0
"""Numbers from papers, where the study carries them, set beside the measured rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from visprune.eval.report.rows import Row, Table

__all__ = ["attach_published"]


def attach_published(study: Mapping[str, Any], tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Give each row the published numbers of its model, task, method and budget.

    Args:
        study: its ``published`` is ``{"source", "rows": [{"model", "task", "label", "metric",
            "score"}]}``, or a list of such; a row may have a ``num_keep`` and a ``source`` of its
            own.
        tables: whose rows get ``published``.

    Returns:
        All published rows, with ``matched``: whether a measured row stands beside it.
    """
    found = []
    for entry in _entries(study.get("published")):
        matched = False
        for table in tables:
            if not _same_task(entry, table) or not _same_model(entry, table.model):
                continue
            if entry.get("metric") not in (None, "score", table.metric):
                continue  # it would stand beside a score of another kind
            for row in table.rows:
                if _same_arm(entry, row):
                    row.published.append(entry)
                    matched = True
        found.append({**entry, "matched": matched})
    return found


def _entries(published: Any) -> Iterator[dict[str, Any]]:
    for group in published if isinstance(published, list) else [published]:
        if not isinstance(group, dict):
            continue
        for row in group.get("rows") or ():
            score = row.get("score") if isinstance(row, dict) else None
            if isinstance(score, int | float) and not isinstance(score, bool):
                about = {name: str(group.get(name) or "") for name in ("source", "note")}
                yield {**about, **row}


def _plain(text: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "", str(text or "").lower())


def _label(text: Any) -> str:
    """A method's name to compare: 25 % is not 25 tokens, and 2.5 % not 25 %."""
    return re.sub(r"[^a-z0-9%.]+", "", str(text or "").lower())


def _same_task(entry: Mapping[str, Any], table: Table) -> bool:
    names = (_plain(table.about.get("task")), _plain(table.task))
    return _plain(entry.get("task")) in names


def _same_model(entry: Mapping[str, Any], model: str) -> bool:
    """Without a model the entry speaks of any; else one name ends with the other (an owner)."""
    name, other = _plain(entry.get("model")), _plain(model)
    return not name or name.endswith(other) or other.endswith(name)


def _same_arm(entry: Mapping[str, Any], row: Row) -> bool:
    label, keep = _label(entry.get("label")), entry.get("num_keep")
    if label == _label(row.arm.label):
        return keep is None or row.arm.num_keep is None or keep == row.arm.num_keep
    if label == _label(row.arm.method) and keep is not None:
        return bool(keep == row.arm.num_keep)
    return row.arm.untouched and label in ("untouched", "full", "original", "upperbound", "none")
