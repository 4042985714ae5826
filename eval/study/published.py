# SPDX-License-Identifier: Apache-2.0
"""Published numbers in a study, for the report to set beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visprune.errors import ConfigError, did_you_mean

__all__ = ["read_published"]

_KEYS = ("source", "note", "model", "columns", "rows")


def read_published(raw: Any) -> dict[str, Any]:
    """Turn the table of a study's YAML into rows of one number each.

    ::

        published:
          source: "ToDRE, arXiv:2505.18757v2, table 1"
          model: llava-hf/llava-v1.6-vicuna-7b-hf
          columns: [mme, gqa]              # a task, or task/metric where it is not its score
          rows:
            none: [1519.6, 64.2]           # by label, "-" where the paper has no number
            todre 720: [1504.3, 63.3]

    A list of such tables becomes one, whose rows each say their source.

    Returns:
        ``{"source", "note", "model", "rows": [{"model", "label", "task", "metric", "score"}]}``;
        empty for ``None``.

    Raises:
        ConfigError: a key is unknown, or a row has another length than the columns.
    """
    if raw is None:
        return {}
    if isinstance(raw, list):
        tables = [read_published(table) for table in raw]
        rows = [
            {**row, "source": table["source"], "note": table["note"]}
            for table in tables
            for row in table["rows"]
        ]
        return {"source": "", "note": "", "model": None, "rows": rows}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("rows"), Mapping | Sequence):
        raise ConfigError(f"published takes {', '.join(_KEYS)}; got {raw!r}.")
    for key in raw:
        if key not in _KEYS:
            hint = did_you_mean(str(key), _KEYS)
            raise ConfigError(f"published has no {key!r}.{hint} Keys: {', '.join(_KEYS)}.")
    rows = raw["rows"]
    if isinstance(rows, Mapping):
        rows = [
            row
            for label, values in rows.items()
            for row in _row(str(label), values, raw.get("columns") or [], raw.get("model"))
        ]
    return {
        "source": str(raw.get("source", "")),
        "note": str(raw.get("note", "")),
        "model": raw.get("model"),
        "rows": [dict(row) for row in rows],
    }


def _row(
    label: str, values: Sequence[Any], columns: Sequence[str], model: str | None
) -> list[dict[str, Any]]:
    if len(values) != len(columns):
        raise ConfigError(
            f"published: the row {label!r} has {len(values)} numbers for {len(columns)} columns."
        )
    found = []
    for column, value in zip(columns, values, strict=True):
        task, _, metric = column.partition("/")
        if isinstance(value, int | float):
            row = {"model": model, "label": label, "task": task, "metric": metric or "score"}
            found.append({**row, "score": float(value)})
    return found
