# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind: a line per sample, a file per cell, and nothing else.

A *cell* is one model under one method on one task with one seed: everything that changes an answer.
A *record* is one sample of one cell. Records are appended as they are made, one JSON line each, by
any number of processes, each into a file of its own; every table is computed from them alone.
:mod:`visprune.eval.records.folder` has the folder they lie in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from visprune.errors import ConfigError

__all__ = ["VERSION", "Cell", "Record", "canonical", "merge"]

VERSION = 1


def canonical(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no blanks. Equal values have equal bytes.

    Raises:
        ConfigError: it holds something that JSON has not, or a number that is not finite.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"This cannot be written as JSON ({error}): {value!r}.") from error
    return text.encode()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model under one method on one task with one seed.

    Attributes:
        model: ``name``, ``weights`` (hash), ``dtype``, ``attention`` and what else the answers
            depend on.
        method: ``method.to_dict()``; ``{"method": "none"}`` is the untouched model,
            ``{"method": "no_image"}`` the model without the picture.
        task: ``task.to_dict()``: name, version, options. ``limit`` is not part of the identity.
        prompt_style: how questions are put.
        generation: options of ``generate``.
        seed: of the question set and of random draws.
        label: what tables call the method, ``"todre 64"``. Not part of the identity.
        num_keep: budget in tokens of one image, where it is one. Not part of the identity.
        control: the row is a control. Not part of the identity.
        refused: why it cannot run (the model lacks what the method needs), else ``None``.
    """

    model: Mapping[str, Any]
    method: Mapping[str, Any]
    task: Mapping[str, Any]
    prompt_style: str
    generation: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    label: str = ""
    num_keep: int | None = None
    control: bool = False
    refused: str | None = None

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of everything that changes the answers.

        How many samples are asked changes none: a longer study goes on with what is there.
        """
        names = ("model", "method", "task", "prompt_style", "generation", "seed")
        parts = {name: getattr(self, name) for name in names}
        parts["task"] = {key: value for key, value in self.task.items() if key != "limit"}
        return hashlib.sha256(canonical(parts)).hexdigest()[:16]

    def key(self, prompt: str, image_hash: str | None) -> str:
        """SHA-256 of the cell, a prompt and the pixels of its picture (hex)."""
        whole = "\0".join((self.id, image_hash or "", prompt))
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return what ``cells/<id>.json`` holds."""
        return {"cell": self.id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read it back.

        Raises:
            ConfigError: a field is missing, or the id is not that of the content: it was edited.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        try:
            cell = cls(**{name: value for name, value in values.items() if name in names})
        except TypeError as error:
            raise ConfigError(f"This is no cell of an evaluation: {error}.") from error
        if cell.id != values.get("cell"):
            raise ConfigError(
                f"The cell {values.get('cell')!r} was changed: its content has the id {cell.id!r}."
            )
        return cell


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample of one cell; what a line of ``records*.jsonl`` holds.

    Attributes:
        cell: id of the cell.
        sample: id of the sample, unique within the task.
        key: see :meth:`Cell.key`.
        kind: for the breakdown.
        cluster: what a bootstrap draws: the picture.
        question: as the data set has it.
        prompt: the user's turn as it was put, without the model's own markup.
        answers: references.
        choices: of a multiple-choice question.
        text: raw output; ``None`` if there is none.
        answer: what the task read out of it; ``None``: unparsed.
        rule: name of the parse rule that hit.
        score: in [0, 1]; ``None`` with an error, or where references are not public.
        error: ``{"type", "message"}``, or ``None``.
        tokens: visual tokens, mean over decoder layers.
        macs: multiply-adds by part, see :data:`visprune.cost.cost.PARTS`.
        kv_bytes: keys and values after the prefill, of this sample alone (no padding).
        new_tokens: tokens generated.
        picture: ``pictures/<picture>.jpg``.
        kept: ``{"grid": [h, w], "kept": base64 of bits, row-major}``; with ``regions`` (a list of
            the same) where a picture was cut into several grids, and ``box`` (left, top, right,
            bottom of the grid in fractions of the picture) where the model sees a part of it.
        beyond: tokens of prompt and answer beyond the positions that the model was made for;
            ``None``: all are within.
        seconds: wall time of the model for this sample (of a batch: its share).
        env: id of the environment.
        meta: what else the task wants to keep.
    """

    cell: str
    sample: str
    key: str = ""
    kind: str = ""
    cluster: str = ""
    question: str = ""
    prompt: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    text: str | None = None
    answer: str | None = None
    rule: str = ""
    score: float | None = None
    error: Mapping[str, str] | None = None
    tokens: float | None = None
    macs: Mapping[str, int] | None = None
    kv_bytes: int | None = None
    new_tokens: int | None = None
    picture: str | None = None
    kept: Mapping[str, Any] | None = None
    beyond: int | None = None
    seconds: float = 0.0
    env: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> bytes:
        """Return the record as one JSON line, its line end included.

        Raises:
            ConfigError: ``meta`` holds what JSON has not, or a number is not finite.
        """
        values = {name: getattr(self, name) for name in _FIELDS}
        try:
            text = json.dumps({"v": VERSION, **values}, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Sample {self.sample!r} cannot be written: {error}.") from error
        # A lone surrogate (a broken byte of a file name) becomes \udc80: the same escape in JSON.
        return text.encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a line's JSON; fields that a later version added are left out."""
        known = {name: value for name, value in values.items() if name in _NAMES}
        for name in ("answers", "choices"):
            known[name] = tuple(known.get(name) or ())
        return cls(**known)


_FIELDS = tuple(f.name for f in dataclasses.fields(Record))
_NAMES = frozenset(_FIELDS)


def merge(records: Iterable[Record]) -> list[Record]:
    """One record per (cell, sample), sorted by both: the same whoever wrote them, in what order.

    Of several, the first without an error counts (errors can be tried again), else the first.
    """
    chosen: dict[tuple[str, str], Record] = {}
    for record in records:
        name = (record.cell, record.sample)
        if name not in chosen or (chosen[name].error is not None and record.error is None):
            chosen[name] = record
    return [chosen[name] for name in sorted(chosen)]
