# SPDX-License-Identifier: Apache-2.0
"""Imports point down only."""

from __future__ import annotations

import ast

import pytest

from tests.packaging.layers import (
    ALLOWED,
    FLAT,
    LAYERS,
    OWNERS,
    circles,
    imports_of,
    layer_of,
    violations,
)
from tests.packaging.repo import LINKED, ROOT, files, module_name

SOURCES = {module_name(path): path for path in files("visprune", *LINKED) if path.suffix == ".py"}
KNOWN = set(SOURCES) | {
    "visprune.errors",
    "visprune.ops",
    "visprune.machine.run",
    "visprune.methods.fastv",
    "visprune.kernels.a.op",
    "visprune.kernels.a.reference",
}


def test_imports_point_down_only() -> None:
    found = [
        f"{path}: {violation}"
        for module, path in SOURCES.items()
        for violation in violations(
            module,
            (ROOT / path).read_text(encoding="utf-8"),
            known=set(SOURCES),
            is_package=path.name == "__init__.py",
        )
    ]
    assert len(SOURCES) > 10
    assert not found, "\n" + "\n".join(found)


def test_no_circle_of_files() -> None:
    graph = {
        module: {
            target
            for _, target in imports_of(
                module,
                (ROOT / path).read_text(encoding="utf-8"),
                known=set(SOURCES),
                is_package=path.name == "__init__.py",
            )
            # The face of a folder hands on what lies in it, and is nobody's foundation.
            if target in SOURCES and SOURCES[target].name != "__init__.py" and target != module
        }
        for module, path in SOURCES.items()
    }
    assert sum(map(len, graph.values())) > 500
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c"]]


@pytest.mark.parametrize("folder", FLAT)
def test_no_new_flat_file(folder: str) -> None:
    flat = {path.stem for path in files(folder) if path.suffix == ".py" and len(path.parts) == 2}
    assert flat == FLAT[folder], "a new file lies in a room: see CONTRIBUTING.md"


def test_the_dictionary_is_complete() -> None:
    assert set(LAYERS.values()) == set(ALLOWED)
    assert set().union(*ALLOWED.values(), *OWNERS.values()) <= set(ALLOWED)


def test_no_two_layers_import_each_other() -> None:
    # `top` is the face that the layers above it look at; it imports lazily.
    pairs = {frozenset((a, b)) for a in ALLOWED for b in ALLOWED[a] if a != b and a in ALLOWED[b]}
    assert pairs == {frozenset(("top", "eval")), frozenset(("top", "train"))}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("visprune.methods.todre", "from visprune.methods.fastv import FastV"),
        ("visprune.methods.todre", "from .fastv import FastV"),
        ("visprune.methods.todre", "from visprune.machine.run import prune"),
        ("visprune.methods.todre", "def f():\n    import visprune.backbones.vlm"),
        ("visprune.methods.todre", "import transformers.models.llama"),
        ("visprune.methods.todre", "from visprune import kernels"),
        ("visprune.backbones.vlm.llava", "from visprune.methods import TABLE"),
        ("visprune.backbones.vlm.llava", "import visprune"),
        ("visprune.ops", "from visprune.kernels.a.reference import f"),
        ("visprune.ops", "from visprune.kernels.a import reference"),
        ("visprune.ops", "import triton"),
        ("visprune.kernels.a.op", "from visprune.errors import ConfigError"),
        ("visprune.kernels.a.op", "from visprune.kernels.b import op"),
        ("visprune.kernels.a.op", "import triton.language as tl"),
        ("visprune.machine.run", "from visprune.eval.run import runner"),
        ("visprune.machine.run", "import timm"),
        ("visprune.eval.run.runner", "from visprune.cli.commands import main"),
        ("visprune.core.tokens", "from visprune.methods.todre import ToDRE"),
        ("visprune.core.tokens", "from visprune.cost.macs import per_layer"),
        ("visprune.cost.cost", "from visprune.core.tokens import VisualTokens"),
        ("visprune.ops", "from visprune.core.tokens import VisualTokens"),
        ("visprune.backbones.vlm.llava", "from visprune.machine.run import prune"),
        ("visprune.newcomer", "import torch"),
        ("visprune.machine.run", "from visprune.newcomer import f"),
    ],
)
def test_forbidden_edges_are_found(module: str, source: str) -> None:
    (found,) = violations(module, source, known=KNOWN, is_package=False)
    assert found.startswith(f"line {source.count(chr(10)) + 1}: {module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("visprune.methods.todre", "from visprune import ops\nfrom visprune.core.tokens import T"),
        ("visprune.ops", "from visprune.kernels.a import op\nfrom visprune.kernels.a.op import f"),
        (
            "visprune.kernels.a.op",
            "from .reference import f\nfrom visprune.kernels.common import g",
        ),
        (
            "visprune.kernels.a.triton_impl",
            "import triton\nimport triton.language as tl\nimport torch",
        ),
        ("visprune.backbones.vlm.llava", "import transformers\nfrom ._base import Adapter"),
        (
            "visprune.machine.run",
            "from visprune.methods import TABLE\nimport visprune.backbones.vlm",
        ),
        (
            "visprune.eval.run.runner",
            "import visprune\nimport matplotlib.pyplot as plt\nimport timm",
        ),
    ],
)
def test_allowed_edges_pass(module: str, source: str) -> None:
    assert violations(module, source, known=KNOWN, is_package=False) == []


def test_relative_imports_of_a_package_start_inside_it() -> None:
    arguments = ("visprune.kernels.a", "from .op import f\nfrom ..b.op import g")
    (found,) = violations(*arguments, known=KNOWN, is_package=True)
    assert found.startswith("line 2: visprune.kernels.a -> visprune.kernels.b.op")


def test_a_nested_module_belongs_to_its_folder() -> None:
    assert layer_of("visprune.eval.tasks.embedded.draw") == "eval"
    assert layer_of("visprune.kernels.common.device") == "kernels.common"
    assert layer_of("visprune.newcomer.part") is None
    assert layer_of("visprune.cost_macs") is None


WORDS = ("Cost", "ModelSpec", "Picture", "Plan", "Recipe", "Record", "Run", "Stage")


@pytest.mark.parametrize("word", WORDS)
def test_a_word_means_one_thing(word: str) -> None:
    defined = []
    for module, path in SOURCES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            defined += [module] * (word in names)
    assert len(defined) <= 1, f"{word} is defined in {defined}: give one of them another name"
