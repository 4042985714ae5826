# SPDX-License-Identifier: Apache-2.0
"""What answers: models by name, and the one interface through which the runner asks them."""

from __future__ import annotations

import warnings
from typing import Any

from visprune.eval.models.base import (
    EMBEDDED,
    LIBRARIES,
    NO_IMAGE,
    NONE,
    Answerer,
    Choice,
    EvalModel,
    ModelEntry,
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
    "ModelEntry",
    "Output",
    "Request",
    "load_model",
    "offline",
    "weights_hash",
]


def __getattr__(name: str) -> Any:
    if name == "ModelSpec":
        warnings.warn(
            "visprune.eval.models.ModelSpec is called ModelEntry: an entry of a study's models.",
            DeprecationWarning, stacklevel=2,
        )  # fmt: skip
        return ModelEntry
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
