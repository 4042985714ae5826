# SPDX-License-Identifier: Apache-2.0
"""What failed in a results folder, in a sentence."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

from visprune.eval.records.folder import ResultsFolder

__all__ = ["Failures", "commonest_failure"]

_LONGEST = 300


@dataclass(frozen=True)
class Failures:
    """Failed samples of all cells.

    Attributes:
        failed: how many records hold an error.
        records: how many there are.
        reason: the commonest error, its type and message.
        times: how many records hold that one.
    """

    failed: int
    records: int
    reason: str
    times: int

    @property
    def every(self) -> bool:
        """Whether nothing was answered."""
        return self.failed == self.records

    @property
    def text(self) -> str:
        """A sentence for the terminal."""
        what = "Every sample failed" if self.every else f"{self.failed} samples failed"
        rest = "." if self.times == self.failed else f" ({self.times} times; the report lists all)."
        return f"{what}, of {self.records}. The commonest reason: {self.reason}{rest}"


def commonest_failure(folder: ResultsFolder) -> Failures | None:
    """Return what failed, ``None`` where nothing did."""
    found: dict[tuple[str, str], str] = {}  # of each sample; "" where some record has no error
    for line in folder.lines():
        name = (str(line.get("cell")), str(line.get("sample")))
        error = line.get("error")
        if not error:
            found[name] = ""
        elif name not in found:
            message = " ".join(str(error.get("message", "")).split())[:_LONGEST]
            found[name] = sys.intern(f"{error.get('type')}: {message.rstrip('.')}")
    reasons = Counter(reason for reason in found.values() if reason)
    if not reasons:
        return None
    reason, times = min(reasons.items(), key=lambda item: (-item[1], item[0]))
    return Failures(reasons.total(), len(found), reason, times)
