# SPDX-License-Identifier: Apache-2.0
"""Measured time: of the runs of a study, of prefill, decoding and vision transformers."""

from __future__ import annotations

from visprune.eval.speed.measure import measure_jobs, measure_study

__all__ = [
    "measure_jobs",
    "measure_study",
]
