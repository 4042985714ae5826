# SPDX-License-Identifier: Apache-2.0
"""Our folders never stand in the way of packages that are called kernels, eval or configs.

A regular package ``kernels`` in the repository root would win over Hugging Face's whenever the
root is on ``sys.path``, and transformers then fails to import. A folder without ``__init__.py``
is a namespace portion: any real package of that name wins, wherever it stands on the path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.packaging.repo import LINKED, ROOT, run_python

_FIND = """
import importlib.util, json, sys
assert sys.path[0] == ""
specs = {name: importlib.util.find_spec(name) for name in NAMES}
print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))
"""


def _origins(folder: Path, path: str = "") -> dict[str, str | None]:
    code = _FIND.replace("NAMES", repr([*LINKED, "tests"]))
    found: dict[str, str | None] = json.loads(
        run_python(code, cwd=folder, env={"PYTHONPATH": path})
    )
    return found


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"], ids=["root", "tests"])
def test_no_regular_package_is_provided(folder: Path) -> None:
    inside = {name: at for name, at in _origins(folder).items() if at and str(ROOT) in at}
    assert inside == {}


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"], ids=["root", "tests"])
def test_an_installed_package_of_the_same_name_wins(folder: Path, tmp_path: Path) -> None:
    for name in LINKED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    found = _origins(folder, path=str(tmp_path))
    assert {name: found[name] for name in LINKED} == {
        name: str(tmp_path / name / "__init__.py") for name in LINKED
    }


def test_away_from_the_repository_nothing_is_provided(tmp_path: Path) -> None:
    inside = {name: at for name, at in _origins(tmp_path).items() if at and str(ROOT) in at}
    assert inside == {}


def test_pytest_keeps_our_folders_off_the_path(request: pytest.FixtureRequest) -> None:
    assert request.config.getoption("importmode") == "importlib"
    assert [entry for entry in sys.path if entry and Path(entry) == ROOT / "tests"] == []
