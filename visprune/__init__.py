# SPDX-License-Identifier: Apache-2.0
"""visprune: make vision-language models look at fewer tokens, and say what that cost and saved."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Everything heavy is imported when it is first used, so that `import visprune` stays light.
_LAZY = {
    "prune": "visprune.apply",
    "Run": "visprune.apply",
    "get_method": "visprune.catalog",
    "list_methods": "visprune.catalog",
    "list_models": "visprune.catalog",
    "encode_images": "visprune.sharing",
    "evaluate": "visprune.eval.evaluate",
    "load_pretrained": "visprune.saved",
    "save_pretrained": "visprune.saved",
    "Budget": "visprune.budget",
    "Stage": "visprune.budget",
    "Needs": "visprune.needs",
    "Site": "visprune.site",
    "Selection": "visprune.selection",
    "VisualTokens": "visprune.tokens",
    "PruningMethod": "visprune.method",
    "BudgetedMethod": "visprune.method",
    "Trace": "visprune.trace",
    "VispruneError": "visprune.errors",
    "ConfigError": "visprune.errors",
    "BudgetError": "visprune.errors",
    "UnsupportedModel": "visprune.errors",
    "UnsupportedKernel": "visprune.errors",
}

__all__ = ["__version__", "ops", *_LAZY]

if TYPE_CHECKING:
    from visprune import ops as ops
    from visprune.apply import Run as Run
    from visprune.apply import prune as prune
    from visprune.catalog import get_method as get_method
    from visprune.catalog import list_methods as list_methods
    from visprune.catalog import list_models as list_models
    from visprune.eval.evaluate import evaluate as evaluate
    from visprune.saved import load_pretrained as load_pretrained
    from visprune.saved import save_pretrained as save_pretrained


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("visprune.ops")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'visprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
