# SPDX-License-Identifier: Apache-2.0
"""Imports point down only."""

from __future__ import annotations

import pytest

from tests.packaging.layers import ALLOWED, LAYERS, OWNERS, layer_of, violations
from tests.packaging.repo import LINKED, ROOT, files, module_name

SOURCES = {module_name(path): path for path in files("visprune", *LINKED) if path.suffix == ".py"}
KNOWN = set(SOURCES) | {
    "visprune.errors",
    "visprune.ops",
    "visprune.apply",
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
        ("visprune.methods.todre", "from visprune.apply import prune"),
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
        ("visprune.tokens", "from visprune.ops import greedy_diverse"),
        ("visprune.apply", "from visprune.eval import runner"),
        ("visprune.apply", "import timm"),
        ("visprune.eval.runner", "from visprune.cli import main"),
        ("visprune.newcomer", "import torch"),
        ("visprune.apply", "from visprune.newcomer import f"),
    ],
)
def test_forbidden_edges_are_found(module: str, source: str) -> None:
    (found,) = violations(module, source, known=KNOWN, is_package=False)
    assert found.startswith(f"line {source.count(chr(10)) + 1}: {module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("visprune.methods.todre", "from visprune import ops\nfrom visprune.tokens import T"),
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
        ("visprune.apply", "from visprune.methods import TABLE\nimport visprune.backbones.vlm"),
        ("visprune.eval.runner", "import visprune\nimport matplotlib.pyplot as plt\nimport timm"),
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
    assert layer_of("visprune.newcomer_part") is None


def test_a_part_of_a_module_stands_with_it() -> None:
    assert layer_of("visprune.cost_macs") == "vocabulary"
    assert layer_of("visprune.apply_hooks") == "apply"
