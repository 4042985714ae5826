# SPDX-License-Identifier: Apache-2.0
"""The repository as the packaging tests see it: its root, its packages, its files."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("backbones", "configs", "eval", "kernels")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PYPROJECT["tool"]["setuptools"]["packages"]

# Made by tools or by running things; never part of the tree (the same names as in .gitignore).
_MADE = {"__pycache__", "build", "dist", "demo-out"}


def files(*folders: str) -> Iterator[Path]:
    """Yield the tree's own files below ``folders`` (default: all), relative to the root.

    Links are not followed, so nothing is seen twice; hidden and generated folders are left out.
    """
    for start in folders or (".",):
        for where, below, names in os.walk(ROOT / start):
            below[:] = sorted(
                name
                for name in below
                if (name not in _MADE and not name.startswith(".") and ".egg-info" not in name)
                or name == ".ci"
            )
            here = Path(where).relative_to(ROOT)
            yield from (
                here / name for name in sorted(names) if not (ROOT / here / name).is_symlink()
            )


def installed_as(path: Path) -> str:
    """Return where a file of the tree lands in site-packages: ``kernels/x`` below ``visprune/``."""
    return path.as_posix() if path.parts[0] == "visprune" else f"visprune/{path.as_posix()}"


def module_name(path: Path) -> str:
    """Return the import name of a source file of the tree."""
    parts = list(Path(installed_as(path)).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_python(code: str, *, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run ``code`` in a fresh interpreter in ``cwd`` (first on its path) and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
