# SPDX-License-Identifier: Apache-2.0
"""What failed in a results folder, in a sentence."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from visprune.eval.records.folder import ResultsFolder

__all__ = ["Failures", "commonest_failure"]

_LONGEST = 300
_NONE = ("", "")


@dataclass(frozen=True)
class Failures:
    """Failed samples of all cells.

    Attributes:
        failed: how many records hold an error.
        records: how many there are.
        kind: the commonest type of error; messages name files and so differ.
        times: how many records hold one of that type.
        message: the commonest message of that type.
    """

    failed: int
    records: int
    kind: str
    times: int
    message: str

    @property
    def every(self) -> bool:
        """Whether nothing was answered."""
        return self.failed == self.records

    @property
    def text(self) -> str:
        """A sentence for the terminal."""
        what = f"{'Every sample' if self.every else self.failed} failed, of {self.records} samples."
        share = "" if self.times == self.failed else f", {self.times} times"
        return f"{what} The commonest reason{share}: {self.kind}: {self.message}."


def commonest_failure(folder: ResultsFolder) -> Failures | None:
    """Return what failed, ``None`` where nothing did."""
    # Of each sample; the empty one where some record has no error.
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for line in folder.lines():
        name = (str(line.get("cell")), str(line.get("sample")))
        error = line.get("error")
        if not error:
            found[name] = _NONE
        elif name not in found:
            message = " ".join(str(error.get("message", "")).split())[:_LONGEST]
            found[name] = sys.intern(str(error.get("type"))), sys.intern(message.rstrip("."))
    failed = [reason for reason in found.values() if reason != _NONE]
    if not failed:
        return None
    kind, times = _commonest(kind for kind, _ in failed)
    message, _ = _commonest(message for of, message in failed if of == kind)
    return Failures(len(failed), len(found), kind, times, message)


def _commonest(texts: Iterable[str]) -> tuple[str, int]:
    """Return the commonest text (of those that tie, the first by name) and how often it is."""
    return min(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
