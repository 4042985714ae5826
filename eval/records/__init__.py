# SPDX-License-Identifier: Apache-2.0
"""Answers on disk: one JSON line per sample, written as it is made."""

from __future__ import annotations

from visprune.eval.records.record import VERSION, Cell, Record, canonical, merge

__all__ = [
    "VERSION",
    "Cell",
    "Record",
    "canonical",
    "merge",
]
