# SPDX-License-Identifier: Apache-2.0
"""What the command line changes in the study of a file: a flag is the user's last word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visprune.eval.study.variants import listed

__all__ = ["override"]


def override(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a study's file with what the flags say in place of them.

    Args:
        raw: keys of the file.
        changes: see :func:`visprune.eval.study.grid.read_study`.
    """
    changes = dict(changes)
    of_models = dict(changes.pop("model_options", None) or {})
    of_tasks = dict(changes.pop("task_options", None) or {})
    if changes.get("limit") is not None:
        of_tasks = {"limit": changes["limit"], **of_tasks}
    made = {**raw, **changes}
    for what, key, options in (("models", "name", of_models), ("tasks", "task", of_tasks)):
        if options and what not in changes:
            made[what] = [_set(entry, key, options) for entry in listed(what, raw.get(what))]
    own, asked = raw.get("generation"), changes.get("generation")
    if isinstance(own, Mapping) and isinstance(asked, Mapping):
        made["generation"] = {**own, **asked}
    if changes.get("speed") is True and raw.get("speed"):
        made["speed"] = raw["speed"]
    return made


def _set(entry: Any, key: str, options: Mapping[str, Any]) -> Any:
    """A model or a task of the file with options of the command line; what is neither stays."""
    if isinstance(entry, str):
        return {key: entry, **options}
    return {**entry, **options} if isinstance(entry, Mapping) else entry
