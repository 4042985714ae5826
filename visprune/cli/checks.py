# SPDX-License-Identifier: Apache-2.0
"""What a command can refuse before it imports what it runs: names and paths.

PyTorch, torchmetrics and transformers take many seconds; a mistyped word should not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from visprune.errors import ConfigError

__all__ = ["check_drawing", "check_study"]


def check_study(
    study: Path | None, changes: Mapping[str, Any], out: Path | None, *, dry_run: bool
) -> None:
    """Check that a study's file and the flags say what to run, and that its names are known.

    What is not of the form that it should have is left to the reader of studies.

    Args:
        study: the file.
        changes: as ``visprune eval`` passes them on.
        out: results folder.
        dry_run: nothing is written, so that none is needed.

    Raises:
        ConfigError: neither a study nor a model, no results folder, or no such file, model, task
            or method.
    """
    from visprune.catalog import check_method
    from visprune.eval.models.names import check_kind, check_ran_by
    from visprune.eval.tasks.base import tasks
    from visprune.eval.tasks.prompts import check_style

    raw = {**_read(study), **changes}
    for name in _names(raw.get("models"), "name"):
        check_kind(name)
    for told in [*changes.get("models", ()), changes.get("model_options") or {}]:
        check_ran_by(told.get("dtype", "auto"), told.get("engine", "transformers"))
    if isinstance(raw.get("prompt_style"), str):
        check_style(raw["prompt_style"])
    for name in _names(raw.get("tasks"), "task"):
        tasks.check(name)
    for name in _names(raw.get("methods"), "method"):
        if name not in ("none", "no_image"):  # controls, which are no methods
            check_method(name)
    if study is None and not changes.get("models"):
        raise ConfigError(
            "visprune eval takes a study (configs/studies/NAME.yaml), or --model and --task, such "
            "as --model embedded --task embedded. Without --task a model is asked a standard set."
        )
    if out is None and not dry_run:
        raise ConfigError("visprune eval writes into a folder; name it with --out DIR.")


def _read(study: Path | None) -> dict[str, Any]:
    import yaml

    if study is None:
        return {}
    if not study.is_file():
        raise ConfigError(f"There is no study {str(study)!r}; give the path of a YAML file.")
    try:
        raw = yaml.safe_load(study.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _names(entries: Any, key: str) -> Iterable[str]:
    """The names among entries that are names, or mappings with one."""
    for entry in entries if isinstance(entries, list | tuple) else [entries]:
        name = entry.get(key) if isinstance(entry, Mapping) else entry
        if isinstance(name, str):
            yield name


def check_drawing(picture: Path, method: str, model: str | None) -> None:
    """Check what ``visprune show`` is asked for.

    Raises:
        ConfigError: there is no such picture, method or model.
    """
    from visprune.catalog import check_method
    from visprune.eval.models.names import check_kind

    check_method(method)
    if model is not None:
        check_kind(model)
    if not picture.is_file():
        what = "a folder" if picture.is_dir() else "not there"
        raise ConfigError(
            f"The picture {str(picture)!r} is {what}. Give the path of an image file."
        )
