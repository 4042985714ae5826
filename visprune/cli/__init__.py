# SPDX-License-Identifier: Apache-2.0
"""The command ``visprune``."""

from __future__ import annotations

from visprune.cli.commands import app, main

__all__ = [
    "app",
    "main",
]
