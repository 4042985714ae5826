# SPDX-License-Identifier: Apache-2.0
"""What answers: models by name, and the one interface through which the runner asks them."""

from __future__ import annotations

from visprune.eval.models.base import (
    EMBEDDED,
    LIBRARIES,
    NO_IMAGE,
    NONE,
    Answerer,
    Choice,
    EvalModel,
    ModelSpec,
    Output,
    Request,
    offline,
)
from visprune.eval.models.identity import weights_hash
from visprune.eval.models.load import load_model

__all__ = [
    "EMBEDDED",
    "LIBRARIES",
    "NONE",
    "NO_IMAGE",
    "Answerer",
    "Choice",
    "EvalModel",
    "ModelSpec",
    "Output",
    "Request",
    "load_model",
    "offline",
    "weights_hash",
]
