# SPDX-License-Identifier: Apache-2.0
"""Whether a path is a results folder: what can be said before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from visprune.errors import ConfigError

__all__ = ["check_results", "named_arm"]


def check_results(path: str | Path) -> None:
    """Raise ``ConfigError`` where a path is not there, or no results folder."""
    path = Path(path)
    if not (path / "cells").is_dir():
        what = "no results folder: it has no cells/" if path.is_dir() else "not there"
        raise ConfigError(
            f"{str(path)!r} is {what}. Give a folder that `visprune eval --out` wrote."
        )


def named_arm(text: str) -> tuple[str, str]:
    """``RESULTS`` or ``RESULTS:METHOD``: the folder, and the method or nothing."""
    if Path(text).is_dir():
        return text, ""
    folder, _, label = text.rpartition(":")
    return (folder, label) if folder else (text, "")
