# SPDX-License-Identifier: Apache-2.0
"""Put samples to a model and make records of what comes back, errors included."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from visprune.errors import ConfigError, VispruneError
from visprune.eval.models.base import NO_IMAGE, Answerer, Output, Request
from visprune.eval.records.record import Cell, Record
from visprune.eval.run.album import Album, Shot
from visprune.eval.tasks.base import Parsed, Sample, SampleError, Task

__all__ = ["Asker"]

# What can go wrong with one sample: its file, its size, what a processor or a model makes of it. A
# failure of the device itself (torch.AcceleratorError) is not among them: every later sample would
# fail too. Nor is a mistake in our own code, see _is_bug.
_SAMPLE_ERRORS = (VispruneError, ArithmeticError, AttributeError, LookupError, MemoryError, OSError,
                  RuntimeError, TypeError, ValueError, AssertionError)  # fmt: skip
_DEVICE_ERRORS = (torch.AcceleratorError,)
# What a mistake raises. RuntimeError is not among them: PyTorch raises it where memory runs out.
_BUGS = (AttributeError, LookupError, NameError, TypeError, ValueError, AssertionError,
         NotImplementedError)  # fmt: skip


class Asker:
    """Makes the records of one cell.

    Args:
        cell: the cell.
        task: its task.
        environment: id of the environment.
        album: reads pictures, and keeps small copies of them; ``None``: one of this cell alone,
            without copies.
    """

    def __init__(
        self, cell: Cell, task: Task, environment: str, album: Album | None = None
    ) -> None:
        self.cell, self.task, self.environment = cell, task, environment
        self.album = album or Album()
        self._blind = cell.method["method"] == NO_IMAGE
        self._in_turn = "turns" in cell.generation

    def ask(self, answerer: Answerer, samples: Sequence[Sample]) -> list[Record]:
        """Ask a batch. A sample that fails becomes a record with its error; the others go on.

        Only what a picture or a model raises is an error of a sample. What a task raises, and a
        mistake in this package, would be an error of every sample: it ends the run.

        Raises:
            ConfigError: a picture's copy cannot be written.
            torch.AcceleratorError: the device failed.
        """
        made: list[Record | None] = [None] * len(samples)
        asked: list[tuple[int, Request, str | None, str | None]] = []
        for place, sample in enumerate(samples):
            request, shot, error = self._request(sample)
            if request is None:
                made[place] = self._failed(sample, error)
                continue
            copy = None if shot is None else self.album.copy(shot)
            asked.append((place, request, request.digest, copy))
        requests = [request for _, request, _, _ in asked]
        outputs, seconds = _answers(answerer, requests, apart=not self._in_turn)
        for (place, request, digest, picture), output in zip(asked, outputs, strict=True):
            made[place] = self._record(request, digest, picture, output, seconds)
        records = [record for record in made if record is not None]
        if not self._in_turn:
            return records
        numbered = enumerate(records, start=1)
        return [replace(record, meta={**record.meta, "turn": n}) for n, record in numbered]

    def _request(self, sample: Sample) -> tuple[Request | None, Shot | None, BaseException | None]:
        """The request of a sample and its picture, or why there is none."""
        with self._naming(sample):
            prompt = self.task.prompt(sample, self.cell.prompt_style)  # type: ignore[arg-type]
        try:
            shot = None if self._blind else self.album.look(sample.image)
        except _SAMPLE_ERRORS as error:
            if _is_bug(error):
                raise
            return None, None, error
        if shot is None:
            return Request(sample, prompt, None), None, None
        return Request(sample, prompt, shot.image, shot.digest), shot, None

    @contextmanager
    def _naming(self, sample: Sample) -> Iterator[None]:
        """Say which sample a task failed on."""
        try:
            yield
        except Exception as error:
            error.add_note(f"The task {self.task.name} raised this for its sample {sample.id!r}.")
            raise

    def _record(
        self, request: Request, digest: str | None, picture: str | None,
        output: Output | BaseException, seconds: float,
    ) -> Record:  # fmt: skip
        sample = request.sample
        if not isinstance(output, Output):
            return self._failed(sample, output, request.prompt, digest, picture)
        try:
            with self._naming(sample):
                parsed = self.task.parse(output.text, _as_shown(sample, output))
                score = self._score(sample, parsed)
        except SampleError as error:
            return self._failed(sample, error, request.prompt, digest, picture, output.text)
        return Record(
            **self._common(sample, request.prompt, digest, picture),
            text=output.text,
            answer=parsed.answer,
            rule=parsed.rule,
            score=score,
            tokens=output.tokens,
            macs=output.macs,
            kv_bytes=output.kv_bytes,
            new_tokens=output.new_tokens,
            kept=output.kept,
            beyond=output.beyond,
            seconds=round(seconds, 6),
        )

    def _score(self, sample: Sample, parsed: Parsed) -> float | None:
        """The score, ``None`` where the references are not public."""
        if not self.task.scored:
            return None
        score = float(self.task.score(sample, parsed))
        if not math.isfinite(score) or not 0.0 <= score <= 1.0:
            raise ConfigError(f"{self.task.name} scored {score}, which is not in [0, 1].")
        return score

    def _failed(
        self, sample: Sample, error: BaseException | None, prompt: str = "",
        digest: str | None = None, picture: str | None = None, text: str | None = None,
    ) -> Record:  # fmt: skip
        what = {"type": type(error).__name__, "message": str(error)[:2000]}
        return Record(**self._common(sample, prompt, digest, picture), text=text, error=what)

    def _common(
        self, sample: Sample, prompt: str, digest: str | None, picture: str | None
    ) -> dict[str, Any]:
        return {
            "cell": self.cell.id, "sample": sample.id, "key": self.cell.key(prompt, digest),
            "kind": sample.kind, "cluster": sample.cluster, "question": sample.question,
            "prompt": prompt, "answers": tuple(sample.answers), "choices": tuple(sample.choices),
            "picture": picture, "env": self.environment, "meta": dict(sample.meta),
        }  # fmt: skip


def _as_shown(sample: Sample, output: Output) -> Sample:
    """The sample, with the part of its picture that the model was shown if it was another."""
    box = (output.kept or {}).get("box")
    return sample if box is None else dataclasses.replace(sample, meta={**sample.meta, "seen": box})


def _answers(
    answerer: Answerer, requests: list[Request], *, apart: bool = True
) -> tuple[list[Output | BaseException], float]:
    """Ask together, and one by one (``apart``) where that fails; also seconds per sample."""
    if not requests:
        return [], 0.0
    begin = time.perf_counter()
    outputs: list[Output | BaseException] = []
    try:
        outputs += answerer(requests)
        if len(outputs) != len(requests):
            raise RuntimeError(f"{len(requests)} questions were asked, {len(outputs)} answered.")
    except _DEVICE_ERRORS:
        raise
    except _SAMPLE_ERRORS as error:
        if _is_bug(error):
            raise
        if len(requests) == 1 or not apart:
            return [error] * len(requests), 0.0
        outputs = [_answers(answerer, [request])[0][0] for request in requests]
    return outputs, (time.perf_counter() - begin) / len(requests)


def _is_bug(error: BaseException) -> bool:
    """Return whether an error is a mistake in this package, by its type and where it was raised."""
    if isinstance(error, VispruneError) or not isinstance(error, _BUGS):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith(f"{_PACKAGE}.")


_PACKAGE = __name__.partition(".")[0]
