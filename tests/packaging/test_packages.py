# SPDX-License-Identifier: Apache-2.0
"""The explicit package list equals the folders: a forgotten row is silently absent from wheels."""

from __future__ import annotations

import os

import pytest

from tests.packaging.repo import LINKED, PACKAGES, PYPROJECT, ROOT, files, module_name


def _source_folders() -> set[str]:
    sources = [path for path in files("visprune", *LINKED) if path.suffix == ".py"]
    return {module_name(path.parent / "__init__.py") for path in sources}


def test_the_list_equals_the_folders() -> None:
    # The four folders are packages whether or not they hold a module directly.
    assert sorted(PACKAGES) == sorted(_source_folders() | {f"visprune.{name}" for name in LINKED})


def test_folders_with_sources_are_packages() -> None:
    sources = [path for path in files("visprune", *LINKED) if path.suffix == ".py"]
    folders = {path.parent for path in sources if path.parent.as_posix() not in LINKED}
    assert [
        str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()
    ] == []


@pytest.mark.parametrize("name", LINKED)
def test_the_four_folders_are_namespaces_mapped_and_linked(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists(), "would shadow an installed package"
    assert PYPROJECT["tool"]["setuptools"]["package-dir"][f"visprune.{name}"] == name
    link = ROOT / "visprune" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
