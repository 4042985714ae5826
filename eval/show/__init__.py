# SPDX-License-Identifier: Apache-2.0
"""Drawings: what of a picture a model still sees."""

from __future__ import annotations

from visprune.eval.show.vlm import open_picture, show

__all__ = [
    "open_picture",
    "show",
]
