# SPDX-License-Identifier: Apache-2.0
"""What answers: models by name, and the one interface through which the runner asks them.

Imported when first used: the command line looks at names before anything heavy.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprune.eval.models.base import NO_IMAGE as NO_IMAGE
    from visprune.eval.models.base import NONE as NONE
    from visprune.eval.models.base import Answerer as Answerer
    from visprune.eval.models.base import Choice as Choice
    from visprune.eval.models.base import EvalModel as EvalModel
    from visprune.eval.models.base import ModelEntry as ModelEntry
    from visprune.eval.models.base import Output as Output
    from visprune.eval.models.base import Request as Request
    from visprune.eval.models.base import offline as offline
    from visprune.eval.models.identity import weights_hash as weights_hash
    from visprune.eval.models.load import load_model as load_model
    from visprune.eval.models.names import EMBEDDED as EMBEDDED
    from visprune.eval.models.names import LIBRARIES as LIBRARIES

_FILES = {
    "base": ("NONE", "NO_IMAGE", "Answerer", "Choice", "EvalModel", "ModelEntry", "Output",
             "Request", "offline"),
    "identity": ("weights_hash",),
    "load": ("load_model",),
    "names": ("EMBEDDED", "LIBRARIES"),
}  # fmt: skip
_FILE = {name: file for file, names in _FILES.items() for name in names}

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
        name = "ModelEntry"
    if name in _FILE:
        return getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
