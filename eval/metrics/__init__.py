# SPDX-License-Identifier: Apache-2.0
"""Metrics as the official evaluators have them, as torchmetrics classes."""

from __future__ import annotations

from visprune.eval.metrics.beside import (
    Floors,
    Loyalty,
    beside,
    floors,
    loyalty,
    unparsed_rate,
    yes_rate,
)
from visprune.eval.metrics.boxes import RECAccuracy
from visprune.eval.metrics.letters import LetterMatch
from visprune.eval.metrics.mme import MME
from visprune.eval.metrics.pope import POPE
from visprune.eval.metrics.reading import ANLS, RelaxedAccuracy
from visprune.eval.metrics.text import ExactMatch, GQAAccuracy
from visprune.eval.metrics.topk import TopK
from visprune.eval.metrics.vqa import VQAAccuracy, vqa_accuracy

__all__ = [
    "ANLS",
    "MME",
    "POPE",
    "ExactMatch",
    "Floors",
    "GQAAccuracy",
    "LetterMatch",
    "Loyalty",
    "RECAccuracy",
    "RelaxedAccuracy",
    "TopK",
    "VQAAccuracy",
    "beside",
    "floors",
    "loyalty",
    "unparsed_rate",
    "vqa_accuracy",
    "yes_rate",
]
