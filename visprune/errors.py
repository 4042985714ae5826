# SPDX-License-Identifier: Apache-2.0
"""The errors visprune raises: what was wrong, what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VispruneError(Exception):
    """Base of every error that visprune raises on purpose."""


class ConfigError(VispruneError, ValueError):
    """A name, parameter or file that the user gave is not usable."""


class BudgetError(ConfigError):
    """A budget (``num_keep`` or ``keep_ratio``) is missing, contradictory or out of range."""


class UnsupportedModel(VispruneError, TypeError):
    """The model, or a part of it, cannot run the requested method."""


class UnsupportedKernel(VispruneError, RuntimeError):
    """A kernel backend was forced that cannot run on these inputs."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its type where it says nothing.

    Where that line only announces what follows ("Error(s) in loading state_dict for X:"), the next
    one is a part of it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".:")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
