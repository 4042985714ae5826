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
_NAMED = 3  # rows without any answer: so many are named
_NONE = ("", "")


@dataclass(frozen=True)
class Failures:
    """Failed samples of a study's cells.

    Attributes:
        failed: how many records hold an error.
        records: how many there are.
        kind: the commonest type of error; messages name files and so differ.
        times: how many records hold one of that type.
        message: the commonest message of that type.
        silent: methods of which not one sample of a task was answered (``"todre 8 (gqa)"``): their
            rows are empty, though others may not be. A question that is asked without its picture
            is answered also where no picture can be read.
    """

    failed: int
    records: int
    kind: str
    times: int
    message: str
    silent: tuple[str, ...] = ()

    @property
    def every(self) -> bool:
        """Whether nothing was answered."""
        return self.failed == self.records

    @property
    def text(self) -> str:
        """What to say in the terminal."""
        what = f"{'Every sample' if self.every else self.failed} failed, of {self.records} samples."
        share = "" if self.times == self.failed else f", {self.times} times"
        said = f"{what} The commonest reason{share}: {self.kind}: {self.message}."
        if self.every or not self.silent:
            return said
        more = len(self.silent) - _NAMED
        named = ", ".join(self.silent[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{said} Nothing at all was answered under {named}."


def commonest_failure(folder: ResultsFolder) -> Failures | None:
    """Return what failed, ``None`` where nothing did."""
    cells = folder.cells()
    # Of each sample; the empty one where some record has no error.
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for line in folder.lines():
        name = (str(line.get("cell")), str(line.get("sample")))
        error = line.get("error")
        if name[0] not in cells:
            continue
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
    asked = {cell for cell, _ in found}
    answered = {cell for (cell, _), reason in found.items() if reason == _NONE}
    silent = [cells[name] for name in cells if name in asked - answered]
    labels = dict.fromkeys(f"{cell.label} ({cell.task.get('task')})" for cell in silent)
    return Failures(len(failed), len(found), kind, times, message, tuple(labels))


def _commonest(texts: Iterable[str]) -> tuple[str, int]:
    """Return the commonest text (of those that tie, the first by name) and how often it is."""
    return min(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
