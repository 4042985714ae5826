# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the picture of CONTRIBUTING.md as data, and a checker on the syntax tree.

Every import statement counts, also one inside a function or under ``TYPE_CHECKING``: an arrow is
an arrow. Registry rows are strings and no imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

_VOCABULARY = (
    *("errors", "registry", "tokens", "selection", "slots", "budget", "site", "needs", "method"),
    *("trace", "cost"),
)

_MACHINE = (
    *("apply", "catalog", "forward", "stages", "outputs", "plan", "run_cost", "saved", "sharing"),
)

# Longest prefix wins. A new module in visprune/ needs a row: decide where it stands. Parts of a
# module that grew too long stand with it: `cost_macs` with `cost`.
LAYERS = {
    "visprune": "top",
    "visprune.cli": "cli",
    "visprune.eval": "eval",
    "visprune.train": "train",
    "visprune.methods": "methods",
    "visprune.backbones": "backbones",
    "visprune.ops": "ops",
    "visprune.kernels": "kernels",
    "visprune.kernels.common": "kernels.common",
    **dict.fromkeys((f"visprune.{name}" for name in _MACHINE), "apply"),
    **dict.fromkeys((f"visprune.{name}" for name in _VOCABULARY), "vocabulary"),
}

# From a layer to the layers that it may import; a row that names itself may look sideways.
ALLOWED = {
    "cli": {"cli", "top", "eval", "train", "apply", "methods", "backbones", "ops", "vocabulary"},
    "top": {"eval", "train", "apply", "methods", "backbones", "ops", "vocabulary"},
    "train": {"top", "train", "eval", "apply", "methods", "backbones", "ops", "vocabulary"},
    "eval": {"top", "eval", "apply", "methods", "backbones", "ops", "vocabulary"},
    "apply": {"apply", "methods", "backbones", "ops", "vocabulary"},
    "methods": {"ops", "vocabulary"},
    "backbones": {"backbones", "ops", "vocabulary"},
    "ops": {"ops", "kernels", "vocabulary"},  # kernels: their op.py alone, see _edge_allowed
    "kernels": {"kernels.common"},  # and their own folder
    "kernels.common": {"kernels.common"},
    "vocabulary": {"vocabulary"},
}

# Libraries that belong to some layers only; a library without a row may be imported anywhere.
OWNERS = {
    "transformers": {"backbones", "eval", "train"},
    "timm": {"backbones", "eval", "train"},
    "open_clip": {"backbones", "eval", "train"},
    "accelerate": {"backbones", "eval", "train"},
    "peft": {"backbones", "eval", "train"},
    "datasets": {"eval", "train"},
    "matplotlib": {"eval", "train"},
    "torchmetrics": {"eval", "train"},
    "rich": {"cli", "eval", "train"},
    "typer": {"cli"},
    "triton": set(),  # only kernels/*/triton_*.py, see violations
}


def layer_of(module: str) -> str | None:
    """Return the layer of a module of ours, or None where no row of ``LAYERS`` speaks of it."""
    parts = module.split(".")
    if len(parts) > 1 and ".".join(parts[:2]) not in LAYERS:
        whole = f"visprune.{parts[1].partition('_')[0]}"
        return LAYERS.get(whole) if whole != f"visprune.{parts[1]}" else None
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(LAYERS[prefix] for prefix in prefixes if prefix in LAYERS)


def violations(module: str, source: str, *, known: set[str], is_package: bool) -> list[str]:
    """Return ``"line N: A -> B: why"`` for each import of ``module`` that is not allowed.

    Args:
        module: Import name, ``"visprune.methods.fastv"``.
        source: Its text.
        known: Import names of all modules of ours, to tell a module from an attribute.
        is_package: Whether the source is an ``__init__.py`` (relative imports start there).
    """
    layer = layer_of(module)
    if layer is None:
        return [f"line 1: {module} stands in no layer; give it a row in LAYERS"]
    found = []
    for line, target in _imports(module, ast.parse(source), known, is_package):
        library = target.partition(".")[0]
        if library == "visprune":
            if target != module and not _edge_allowed(module, target):
                why = f"{layer} may not import {layer_of(target) or 'what stands in no layer'}"
                found.append(f"line {line}: {module} -> {target}: {why}")
        elif library == "triton":
            last = module.rpartition(".")[2]
            if not layer.startswith("kernels") or not last.startswith("triton_"):
                found.append(f"line {line}: {module} -> {target}: only kernels/*/triton_* may")
        elif layer not in OWNERS.get(library, {layer}):
            owners = ", ".join(sorted(OWNERS[library]))
            found.append(f"line {line}: {module} -> {target}: only {owners} may")
    return found


def _edge_allowed(module: str, target: str) -> bool:
    """Return whether ``module`` may import ``target``, both of ours."""
    source_layer, target_layer = layer_of(module), layer_of(target)
    if source_layer is None or target_layer is None:
        return False
    if source_layer == target_layer == "kernels":
        return module.split(".")[2] == target.split(".")[2]
    if (source_layer, target_layer) == ("ops", "kernels"):
        return target.split(".")[3:] == ["op"]
    return target_layer in ALLOWED[source_layer]


def _imports(
    module: str, tree: ast.Module, known: set[str], is_package: bool
) -> Iterator[tuple[int, str]]:
    """Yield line and full module name of everything that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *base.split(".")] if base else parts)
            for alias in node.names:
                # `from visprune import ops` imports visprune.ops; `from .op import run` .op alone.
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base
