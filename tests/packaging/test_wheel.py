# SPDX-License-Identifier: Apache-2.0
"""What a user gets: the sdist, the wheel made from it, and imports from an empty folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.repo import LINKED, PACKAGES, ROOT, files, installed_as, run_python

pytestmark = pytest.mark.xdist_group("wheel")  # one build, not one per process


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist of a copy of the tree, and the wheel built from that sdist."""
    copy = tmp_path_factory.mktemp("copy")
    for path in files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    for name in LINKED:
        (copy / "visprune" / name).symlink_to(f"../{name}")
    dist = tmp_path_factory.mktemp("dist")
    _run("build", "--no-isolation", "--outdir", str(dist), str(copy))
    return dist


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which only the wheel was installed."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    _run("pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    return site


def _run(module: str, *arguments: str) -> None:
    """Run ``python -m module``; show its output where it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_wheel_holds_the_tree_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {installed_as(path) for path in files("visprune", *LINKED)}
    assert {name.partition("/")[0] for name in names} == {"visprune"}


def test_the_sdist_keeps_the_folders(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.as_posix() for path in files("visprune", *LINKED)}
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not {name for name in names if name.startswith(tuple(f"visprune/{n}/" for n in LINKED))}


def test_every_package_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, os
for name in {PACKAGES!r}:
    module = importlib.import_module(name)
    for where in module.__path__:
        assert os.path.realpath(where).startswith({str(installed.resolve())!r}), (name, where)
print("all", len({PACKAGES!r}))
"""
    output = run_python(code, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert output == f"all {len(PACKAGES)}"


def test_the_command_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = """
import sys, visprune.cli.commands
sys.argv = ["visprune", "methods"]
visprune.cli.commands.main()
"""
    output = run_python(code, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert "todre" in output
    assert (installed / "bin" / "visprune").is_file()
