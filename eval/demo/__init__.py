# SPDX-License-Identifier: Apache-2.0
"""The demonstration: methods and budgets on the embedded model, offline."""

from __future__ import annotations

from visprune.eval.demo.run import BUDGETS, METHODS, DemoGrid, run_demo

__all__ = [
    "BUDGETS",
    "METHODS",
    "DemoGrid",
    "run_demo",
]
