# SPDX-License-Identifier: Apache-2.0
"""Studies: grids of models, methods, budgets, tasks and seeds."""

from __future__ import annotations

from visprune.eval.study.grid import SpeedPlan, Study, build_study, read_study

__all__ = [
    "SpeedPlan",
    "Study",
    "build_study",
    "read_study",
]
