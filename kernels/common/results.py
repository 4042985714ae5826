# SPDX-License-Identifier: Apache-2.0
"""Bench rows with what they were measured on, printed as a table and added to a CSV file."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import importlib.util
import platform
import shlex
import sys
from pathlib import Path

import torch

from . import timing

Row = dict[str, object]


def machine(device: str, threads: int) -> Row:
    """Device name, versions, date and the command line."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    triton = "-"
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.metadata.version("triton")
    return {
        "device": gpu,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}",  # argv[0] is `visprune bench NAME`
    }


def show(rows: list[Row], about: Row, path: Path | None) -> None:
    """Print the table and what it was measured on; add the rows to ``path`` if one is given."""
    print(timing.table(rows))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if path is None or not rows:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        if new:
            writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
