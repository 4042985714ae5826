# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the picture of CONTRIBUTING.md as data, and a checker on the syntax tree.

Every import statement counts, also one inside a function or under ``TYPE_CHECKING``: an arrow is
an arrow. Registry rows are strings and no imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

# One row a folder, longest prefix wins; four files lie flat, and a fifth needs a reason and a row.
LAYERS = {
    "visprune": "top",
    "visprune.version": "version",
    "visprune.errors": "errors",
    "visprune.catalog": "catalog",
    "visprune.cli": "cli",
    "visprune.core": "core",
    "visprune.cost": "cost",
    "visprune.eval": "eval",
    "visprune.machine": "machine",
    "visprune.methods": "methods",
    "visprune.onnx": "onnx",
    "visprune.ops": "ops",
    "visprune.serving": "serving",
    "visprune.train": "train",
    "visprune.backbones": "backbones",
    "visprune.kernels": "kernels",
    "visprune.kernels.common": "kernels.common",
}

# From a layer to the layers that it may import; one that names itself may look sideways.
ALLOWED = {
    "version": set(),
    "errors": set(),
    "kernels.common": {"kernels.common"},
    "kernels": {"kernels.common"},  # and their own folder
    "ops": {"ops", "kernels", "kernels.common", "errors"},  # kernels: op.py alone, _edge_allowed
    "onnx": {"onnx", "ops", "errors"},
    "core": {"core", "ops", "errors"},
    "cost": {"cost", "errors"},
    "methods": {"methods", "core", "ops", "errors"},  # one from another: `_` files alone
    "backbones": {"backbones", "core", "cost", "ops", "errors"},
    "catalog": {"methods", "backbones", "core", "errors"},
    "machine": {"machine", "catalog", "methods", "backbones", "core", "cost", "ops", "errors"},
    "serving": {"serving", "machine", "catalog", "backbones", "core", "errors", "version"},
    "top": {"eval", "train", "machine", "catalog", "core", "ops", "errors", "version"},
    "eval": {"eval", "top", "serving", "machine", "catalog", "methods", "backbones", "core", "cost",
             "ops", "errors", "version"},
    "train": {"train", "top", "eval", "machine", "catalog", "methods", "backbones", "core", "cost",
              "ops", "errors", "version"},
    "cli": {"cli", "top", "eval", "serving", "train", "machine", "catalog", "core", "ops", "errors",
            "version"},
}  # fmt: skip

# Libraries that belong to some layers only; a library without a row may be imported anywhere.
OWNERS = {
    "transformers": {"backbones", "eval", "serving", "train"},
    "vllm": {"serving"},
    "timm": {"backbones", "eval", "train"},
    "open_clip": {"backbones", "eval", "train"},
    "accelerate": {"backbones", "eval", "train"},
    "peft": {"backbones", "eval", "train"},
    "datasets": {"eval", "train"},
    "matplotlib": {"eval", "train"},
    "torchmetrics": {"eval", "train"},
    "rich": {"cli", "eval", "train"},
    "typer": {"cli"},
    "onnx": {"onnx"},
    "onnxscript": {"onnx"},
    "triton": set(),  # only kernels/*/triton_*.py, see violations
}

# Files that may lie directly in a folder; what else there is lies in a room.
FLAT = {
    "visprune": {"__init__", "catalog", "errors", "version"},
    "eval": {
        *("environment", "evaluate", "stats"),
        # Paths that others have written down: lmms-eval's manifest, LLaVA's files.
        *("llava_files", "lmms_eval", "lmms_manifest"),
    },
}


def layer_of(module: str) -> str | None:
    """Return the layer of a module of ours, or None where no row of ``LAYERS`` speaks of it."""
    parts = module.split(".")
    if len(parts) > 1 and ".".join(parts[:2]) not in LAYERS:
        return None
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
    for line, target in imports_of(module, source, known=known, is_package=is_package):
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


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the circles of a graph of modules: each a list of those that reach one another."""
    reach = {module: _reached(graph, module) for module in graph}
    found: list[list[str]] = []
    seen: set[str] = set()
    for module in graph:
        circle = sorted(m for m in reach[module] if module in reach[m])
        if circle and module not in seen:
            found.append(sorted({module, *circle}))
            seen.update(circle)
    return found


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += graph.get(module, ())
    return reached


def _edge_allowed(module: str, target: str) -> bool:
    """Return whether ``module`` may import ``target``, both of ours."""
    source_layer, target_layer = layer_of(module), layer_of(target)
    if source_layer is None or target_layer is None:
        return False
    if source_layer == target_layer == "kernels":
        return module.split(".")[2] == target.split(".")[2]
    if source_layer == target_layer == "methods":
        return target.rpartition(".")[2].startswith("_")
    if (source_layer, target_layer) == ("ops", "kernels"):
        return target.split(".")[3:] == ["op"]
    return target_layer in ALLOWED[source_layer]


def imports_of(
    module: str, source: str, *, known: set[str], is_package: bool
) -> Iterator[tuple[int, str]]:
    """Yield line and full module name of everything that a source imports."""
    for node in ast.walk(ast.parse(source)):
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
