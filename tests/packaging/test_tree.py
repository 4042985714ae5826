# SPDX-License-Identifier: Apache-2.0
"""Rules about the files themselves."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.packaging.repo import LINKED, ROOT, files

# Absolute paths of one machine. Tests take tmp_path, documents write paths from the root.
_MACHINE_PATH = re.compile(r"/(?:work|root|tmp|home|Users)/[A-Za-z.]")


def _text(path: Path) -> str | None:
    """Return a file's text, or None where it is not text."""
    raw = (ROOT / path).read_bytes()
    return None if b"\0" in raw else raw.decode("utf-8", errors="replace")


def test_no_file_mentions_the_path_of_a_machine() -> None:
    hits = [
        f"{path}:{number}: {line.strip()}"
        for path in files()
        for number, line in enumerate((_text(path) or "").splitlines(), start=1)
        if _MACHINE_PATH.search(line)
    ]
    assert hits == []


@pytest.mark.parametrize("line", ["see " + "/" + "tmp/x", 'open("' + "/" + 'home/me/a.png")'])
def test_machine_paths_are_recognised(line: str) -> None:
    assert _MACHINE_PATH.search(line)


def test_every_source_file_names_its_licence() -> None:
    sources = [path for path in files("visprune", "tests", *LINKED) if path.suffix == ".py"]
    assert len(sources) > 10
    bare = [
        str(path)
        for path in sources
        if not (ROOT / path).read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: ")
    ]
    assert bare == []


def _targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):.*##", text, flags=re.MULTILINE))


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_targets_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*make ([a-z]+)|`make ([a-z]+)", text, flags=re.MULTILINE))
    assert {first or second for first, second in named} <= _targets()


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert {line.split()[1] for line in done.stdout.splitlines() if line.strip()} == _targets()


def test_ci_runs_make_test_and_nothing_hides_its_status() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [
        line for line in script.read_text().splitlines() if line and not line.startswith("#")
    ]
    assert commands[0] == "set -euo pipefail"
    assert [c for c in commands if re.fullmatch(r"make (--\S+ )*test", c)]  # fails, then all does
    assert re.fullmatch(r"exec timeout \d+ make (--\S+ )*serving( ARGS=.*)?", commands[-1])
    assert not any("|" in line for line in commands)
