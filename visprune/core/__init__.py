# SPDX-License-Identifier: Apache-2.0
"""All that a pruning method is written with, in one import line.

Read when first used: the command line imports a file of this folder, and must not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprune.core.budget import Budget, Rounding, Schedule, Stage, StepBudget
    from visprune.core.method import (
        BudgetedMethod,
        Context,
        ModelSpec,
        PositionRule,
        PruningMethod,
    )
    from visprune.core.selection import Selection
    from visprune.core.signals import Signal
    from visprune.core.site import Site
    from visprune.core.tokens import VisualTokens

_FILES = {
    **dict.fromkeys(("Budget", "Rounding", "Schedule", "Stage", "StepBudget"), "budget"),
    **dict.fromkeys(
        ("BudgetedMethod", "Context", "ModelSpec", "PositionRule", "PruningMethod"), "method"
    ),
    "Selection": "selection",
    "Signal": "signals",
    "Site": "site",
    "VisualTokens": "tokens",
}

__all__ = [
    "Budget",
    "BudgetedMethod",
    "Context",
    "ModelSpec",
    "PositionRule",
    "PruningMethod",
    "Rounding",
    "Schedule",
    "Selection",
    "Signal",
    "Site",
    "Stage",
    "StepBudget",
    "VisualTokens",
]


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(importlib.import_module(f"visprune.core.{_FILES[name]}"), name)
    raise AttributeError(f"module 'visprune.core' has no attribute {name!r}")
