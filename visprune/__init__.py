# SPDX-License-Identifier: Apache-2.0
"""visprune: make vision-language models look at fewer tokens, and say what that cost and saved."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from visprune.version import __version__ as __version__

# Everything heavy is imported when it is first used, so that `import visprune` stays light.
_LAZY = {
    "prune": "visprune.machine.run",
    "Run": "visprune.machine.run",
    "remove": "visprune.machine.run",
    "runs": "visprune.machine.run",
    "get_method": "visprune.catalog",
    "list_methods": "visprune.catalog",
    "list_models": "visprune.machine.listing",
    "check": "visprune.eval.check.run",
    "cache_to": "visprune.backbones.hf.move",
    "encode_images": "visprune.machine.sharing",
    "evaluate": "visprune.eval.evaluate",
    "load_pretrained": "visprune.machine.saved",
    "save_pretrained": "visprune.machine.saved",
    "Budget": "visprune.core.budget",
    "Stage": "visprune.core.budget",
    "Signal": "visprune.core.signals",
    "Site": "visprune.core.site",
    "Selection": "visprune.core.selection",
    "VisualTokens": "visprune.core.tokens",
    "PruningMethod": "visprune.core.method",
    "BudgetedMethod": "visprune.core.method",
    "Trace": "visprune.core.trace",
    "VispruneError": "visprune.errors",
    "ConfigError": "visprune.errors",
    "BudgetError": "visprune.errors",
    "UnsupportedModel": "visprune.errors",
    "UnsupportedKernel": "visprune.errors",
}

__all__ = ["__version__", "ops", *_LAZY]

if TYPE_CHECKING:
    from visprune import ops as ops
    from visprune.catalog import get_method as get_method
    from visprune.catalog import list_methods as list_methods
    from visprune.eval.check.run import check as check
    from visprune.eval.evaluate import evaluate as evaluate
    from visprune.machine.listing import list_models as list_models
    from visprune.machine.run import Run as Run
    from visprune.machine.run import prune as prune
    from visprune.machine.run import remove as remove
    from visprune.machine.run import runs as runs
    from visprune.machine.saved import load_pretrained as load_pretrained
    from visprune.machine.saved import save_pretrained as save_pretrained


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("visprune.ops")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'visprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
