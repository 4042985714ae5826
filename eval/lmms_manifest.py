# SPDX-License-Identifier: Apache-2.0
"""The entry point through which lmms-eval finds visprune (group ``lmms_eval.models``)."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """Return lmms-eval's ``ModelManifest`` of the model ``visprune``; imports nothing heavy."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="visprune", chat_class_path="visprune.eval.lmms_eval.Visprune")
