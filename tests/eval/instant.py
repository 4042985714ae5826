# SPDX-License-Identifier: Apache-2.0
"""A task and a model that answers at once: what the runner does is all there is to see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.models.base import Answerer, Choice, ModelEntry, Output, Request
from visprune.eval.study.grid import Study, build_study
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, SampleError, Task


@dataclass(frozen=True)
class Tile:
    """A tiny picture of one colour; number -1 is a corrupt file."""

    number: int

    def __call__(self) -> Image.Image:
        if self.number < 0:
            raise SampleError("The picture cannot be read: pictures/broken.jpg.")
        shade = self.number % 251
        return Image.new("RGB", (8, 8), (shade, 255 - shade, self.number // 251 % 256))


class Tiles(Sequence[Sample]):
    """Samples made when they are asked for."""

    def __init__(self, task: Tiling) -> None:
        self.task = task

    def __len__(self) -> int:
        return self.task.limit or 10

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        broken = index in self.task.broken
        return Sample(
            id=f"{self.task.seed}/{index}",
            question=f"{self.task.words} {index}?",
            image=Tile(-1 if broken else index // 3),
            answers=(str(index % 4),),
            kind="even" if index % 2 == 0 else "odd",
            cluster=f"{self.task.seed}/{index // 3}",
            meta={"number": index},
        )


@dataclass(frozen=True, kw_only=True)
class Tiling(Task):
    """Which number a question holds, modulo four."""

    name: ClassVar[str] = "tiling"
    max_new_tokens: ClassVar[int] = 1

    broken: tuple[int, ...] = ()
    words: str = "number"

    def samples(self) -> Sequence[Sample]:
        return Tiles(self)

    def prompt(self, sample: Sample, style: PromptStyle = "plain") -> str:
        return sample.question

    def parse(self, text: str, sample: Sample) -> Parsed:
        return Parsed(text, "exact") if text.isdigit() else Parsed(None)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        return float(parsed.answer in sample.answers)


@dataclass
class Instant:
    """Answers at once, and wrongly every seventh time; some questions make it fail."""

    name: str = "instant"
    generates: bool = True
    style: PromptStyle = "plain"
    failing: tuple[int, ...] = ()
    weights: str = "0" * 16
    dtype: str = "float32"
    asked: list[list[str]] = field(default_factory=list)
    keep_log: bool = True
    forgot: int = 0
    together: int = 1

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.weights, "dtype": self.dtype}

    def refusal(self, choice: Choice, task: Task) -> str | None:
        name = choice if isinstance(choice, str) else choice.name
        return "It has no class token." if name == "visionzip" else None

    def generation(self, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"max_new_tokens": task.max_new_tokens, **options}

    def encodes(self, choice: Choice) -> str:
        return "inside" if choice not in ("none", "no_image") and choice.name == "tome" else ""

    def forget(self) -> None:
        self.forgot += 1

    def no_turns(self, *, query_aware: bool = True) -> str | None:
        return None

    def prompt_length(self, prompt: str) -> int:
        return len(prompt)

    def unseen(self, size: tuple[int, int]) -> str | None:
        return None

    @contextmanager
    def answering(
        self, choice: Choice, task: Task, style: str, generation: Mapping[str, Any]
    ) -> Iterator[Answerer]:
        yield self._answer

    def _answer(self, requests: Sequence[Request]) -> list[Output]:
        if self.keep_log:
            self.asked.append([request.sample.id for request in requests])
        numbers = [int(request.sample.id.split("/")[1]) for request in requests]
        for number in numbers:
            if number in self.failing:
                raise RuntimeError(f"The shapes of question {number} do not fit.")
        return [
            Output(
                text=str((number + (number % 7 == 0)) % 4),
                tokens=16.0,
                macs={"vision": 5, "prefill": 100 + number},
                kv_bytes=64,
                new_tokens=1,
            )
            for number in numbers
        ]


def instant_study(**changes: Any) -> Study:
    """A study of the two; keys as in a study's YAML."""
    limit = changes.pop("limit", 24)
    task = changes.pop("task", Tiling(limit=limit))
    raw: dict[str, Any] = {"models": [ModelEntry("instant")], "tasks": [task], "controls": ["none"]}
    return build_study({**raw, **changes})


def loader(model: Instant) -> Any:
    """What run_study loads models with."""

    def load(spec: ModelEntry) -> Instant:
        if spec.name != model.name:
            raise ConfigError(f"Unknown model {spec.name!r}.")
        return model

    return load
