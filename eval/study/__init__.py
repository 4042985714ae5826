# SPDX-License-Identifier: Apache-2.0
"""Studies: grids of models, methods, budgets, tasks and seeds.

Imported when first used: the command line reads the options of a study before anything heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprune.eval.study.grid import SpeedPlan as SpeedPlan
    from visprune.eval.study.grid import Study as Study
    from visprune.eval.study.grid import build_study as build_study
    from visprune.eval.study.grid import read_study as read_study

__all__ = ["SpeedPlan", "Study", "build_study", "read_study"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("visprune.eval.study.grid"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
