# SPDX-License-Identifier: Apache-2.0
"""A results folder, reduced to what the tables need. Nothing else enters a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from visprune.backbones.vlm.seen import Seen
from visprune.errors import ConfigError
from visprune.eval.records import record as records
from visprune.eval.records.folder import ResultsFolder

__all__ = ["NO_IMAGE", "UNTOUCHED", "Line", "Outcome", "Results", "canonical", "read_results"]

UNTOUCHED = "none"  # the method's name in a cell without pruning
NO_IMAGE = "no_image"


@dataclass(slots=True)
class Line:
    """What the tables need of one record; the browser reads the rest again for a few samples.

    Attributes:
        sample: id of the sample.
        question: as the data set has it.
        kind: kind of the sample.
        cluster: picture of the sample.
        answers: references.
        choices: of a multiple-choice question.
        answer: what was parsed; ``None``: no rule found an answer.
        score: in [0, 1]; ``None`` after an error.
        meta: the sample's own.
        error: type of the error; ``None``: there was none.
        text: the model's raw output, which some tasks aggregate (top-5).
        tokens: visual tokens in the mean over layers.
        macs: multiply-adds by part.
        kv_bytes: bytes of keys and values in the cache.
        new_tokens: tokens generated.
        env: id of the environment that it was made in.
        seen: part of the picture that the model saw.
        squeezed: how far out of shape it saw it; 1: not.
        beyond: it was longer than the model's positions.
    """

    sample: str
    question: str
    kind: str
    cluster: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    answer: str | None
    score: float | None
    meta: Mapping[str, Any]
    error: str | None
    text: str | None
    tokens: float | None
    macs: Mapping[str, float] | None
    kv_bytes: float | None
    new_tokens: float | None
    env: str = ""
    seen: float = 1.0
    squeezed: float = 1.0
    beyond: bool = False


@dataclass(frozen=True)
class Outcome:
    """A cell and what it gave.

    Attributes:
        cell: everything that changes the answers.
        lines: its records by sample.
        speed: measured latency by part; empty: not measured.
    """

    cell: records.Cell
    lines: Mapping[str, Line]
    speed: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Name of the method; ``"none"`` for the untouched model."""
        return str(self.cell.method.get("method", UNTOUCHED))

    @cached_property
    def task(self) -> str:
        """The task with all its options, seed included, as text to compare."""
        return canonical(self.cell.task)


@dataclass(frozen=True)
class Results:
    """A results folder, read.

    Attributes:
        folder: where it is.
        study: the resolved study; empty where the folder has none.
        outcomes: every cell that has records: untouched, controls, methods.
        empty: cells without records.
        environments: command, versions and hardware, by id.
    """

    folder: ResultsFolder
    study: Mapping[str, Any]
    outcomes: Sequence[Outcome]
    empty: Sequence[records.Cell]
    environments: Mapping[str, Mapping[str, Any]]


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return records.canonical(value).decode()


def read_results(path: str | Path) -> Results:
    """Read a results folder, one line at a time.

    Raises:
        ConfigError: it is no results folder, a file in it is damaged, or it holds no records.
    """
    folder = ResultsFolder(path)
    cells = folder.cells()
    lines: dict[str, dict[str, Line]] = {name: {} for name in cells}
    reader = _Reader()
    tasks = {name: canonical(cell.task) for name, cell in cells.items()}
    for values in folder.lines():
        name, sample = str(values["cell"]), str(values["sample"])
        if name not in lines:
            raise ConfigError(
                f"{str(path)!r} holds records of the cell {name!r}, which it does not know: a file "
                f"of another run lies there. Move it out."
            )
        # As visprune.eval.records.record.merge: the first without an error counts, else the first.
        before = lines[name].get(sample)
        if before is None or (before.error is not None and not values.get("error")):
            lines[name][sample] = reader.line(values, tasks[name])
    speed = folder.speed()
    outcomes = [
        Outcome(cell, dict(sorted(lines[name].items())), speed.get(name, {}))
        for name, cell in cells.items() if lines[name]
    ]  # fmt: skip
    if not outcomes:
        raise ConfigError(
            f"{str(path)!r} has {len(cells)} cells and no records yet; run `visprune eval` on it."
        )
    empty = [cell for name, cell in cells.items() if not lines[name]]
    study = folder.study
    return Results(folder, study, _sorted(outcomes), empty, folder.environments())


def _sorted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Untouched first, then controls, then methods as the study has them; large budgets first."""
    first: dict[str, int] = {}
    for place, outcome in enumerate(outcomes):
        first.setdefault(outcome.method, place)

    def order(outcome: Outcome) -> tuple[Any, ...]:
        rank = 0 if outcome.method == UNTOUCHED else 1 if outcome.cell.control else 2
        ratio = _number(outcome.cell.method.get("keep_ratio")) or 0.0
        budget = (-(outcome.cell.num_keep or 0), -ratio)
        return (rank, first[outcome.method], *budget, outcome.cell.label, outcome.cell.seed)

    return sorted(outcomes, key=order)


class _Reader:
    """Reduces records to lines; equal values are held once, whatever the number of cells."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}
        self._samples: dict[tuple[str, str], tuple[Any, ...]] = {}

    def line(self, values: Mapping[str, Any], task: str) -> Line:
        """What the tables need of a record of a task."""
        sample = str(values["sample"])
        if (task, sample) not in self._samples:
            self._samples[task, sample] = (
                sample,
                self._once(str(values.get("question") or "")),
                self._once(str(values.get("kind") or "")),
                str(values.get("cluster") or sample),
                _texts(values.get("answers")),
                _texts(values.get("choices")),
                _dict(values.get("meta")),
            )
        sample, question, kind, cluster, answers, choices, meta = self._samples[task, sample]
        error, said, text = (values.get(name) for name in ("error", "answer", "text"))
        return Line(
            sample=sample,
            question=question,
            kind=kind,
            cluster=cluster,
            answers=answers,
            choices=choices,
            answer=None if said is None else self._once(str(said)),
            score=None if error else self._once(_number(values.get("score"))),
            meta=meta,
            error=self._once(str(_dict(error).get("type") or "error")) if error else None,
            text=None if text is None else self._once(str(text)),
            tokens=self._once(_number(values.get("tokens"))),
            macs=self._macs(values.get("macs")),
            kv_bytes=self._once(_number(values.get("kv_bytes"))),
            new_tokens=self._once(_number(values.get("new_tokens"))),
            env=self._once(str(values.get("env") or "")),
            beyond=bool(values.get("beyond")),
            **self._view(_dict(values.get("kept"))),
        )

    def _view(self, kept: Mapping[str, Any]) -> dict[str, float]:
        """How much of the picture the model saw, and how far out of shape."""
        box, stretch = box_of(kept), _number(kept.get("stretch")) or 1.0
        seen = Seen(None if box is None else (box[0], box[1], box[2], box[3]), stretch)
        return {"seen": self._once(seen.share), "squeezed": self._once(seen.squeezed)}

    def _once(self, value: Any) -> Any:
        return self._held.setdefault(value, value)

    def _macs(self, value: Any) -> Mapping[str, float] | None:
        parts = {str(name): _number(number) for name, number in _dict(value).items()}
        known = {name: number for name, number in parts.items() if number is not None}
        return self._held.setdefault(tuple(known.items()), known) if known else None


def box_of(kept: Mapping[str, Any]) -> list[float] | None:
    """Where the grid lies on the picture, in fractions of it; ``None``: it covers it."""
    box = kept.get("box")
    ends = [_number(end) for end in box] if isinstance(box, list) else []
    inside = [end for end in ends if end is not None and -9 < end < 9]
    return inside if len(inside) == len(ends) == 4 else None


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _dict(value: Any) -> Mapping[str, Any]:
    """A JSON object, or an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A number, or None in place of anything else (JSON's NaN and Infinity included)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if float("-inf") < value < float("inf") else None
