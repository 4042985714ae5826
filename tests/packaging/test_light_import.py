# SPDX-License-Identifier: Apache-2.0
"""``import visprune`` and the command line start without the libraries that they may need later."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.repo import run_python

HEAVY = ["transformers", "timm", "open_clip", "torchvision", "matplotlib", "datasets", "accelerate"]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import visprune", HEAVY),
        ("import visprune.cli.commands", [*HEAVY, "torch"]),
    ],
)
def test_stays_light(statement: str, absent: list[str], tmp_path: Path) -> None:
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    assert run_python(code, cwd=tmp_path) == "[]"
