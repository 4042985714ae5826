# SPDX-License-Identifier: Apache-2.0
"""What a task is: samples, a prompt, parse rules, a score, and a summary made from records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from PIL import Image

from visprune.core.numeric import plain
from visprune.core.registry import Registry
from visprune.errors import ConfigError, VispruneError, did_you_mean
from visprune.eval.tasks import TABLE
from visprune.eval.tasks.scored import Scored

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = [
    "READING",
    "STYLES",
    "Parsed",
    "PromptStyle",
    "Sample",
    "SampleError",
    "Scored",
    "Task",
    "check_option",
    "get_task",
    "list_tasks",
    "sample_of",
    "tasks",
]

PromptStyle = Literal["llava15", "chat", "plain"]
STYLES: tuple[PromptStyle, ...] = ("llava15", "chat", "plain")


READING = "reading and grounding"
"""The ``GROUP`` of tasks that ask for one place of a picture: a word, a number, a box, a line."""


class SampleError(VispruneError):
    """One sample cannot be read (a missing or corrupt picture); the message names the file."""


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        id: unique within a task, its split and its options.
        question: without model markup and without the prompt's instruction.
        image: loads the picture (RGB) when called; raises :class:`SampleError`.
        answers: references; the class number as text where classes are predicted.
        choices: texts of the options, in order (A, B, ...).
        kind: for the breakdown (question type, POPE split, MME category ...).
        cluster: id of the picture; a bootstrap draws these.
        meta: JSON values: OCR tokens, hint, box ... For ``parse``, ``seen`` is where what the model
            is shown lies on the picture: left, top, right, bottom in fractions of it.
    """

    id: str
    question: str
    image: Callable[[], Image.Image]
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    kind: str = ""
    cluster: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parsed:
    """What was read from a model's output.

    Attributes:
        answer: the answer; ``None``: no rule found one.
        rule: name of the rule that found it.
    """

    answer: str | None
    rule: str = ""


def sample_of(record: Any) -> Sample:
    """Return a record's sample, all but its picture."""

    def no_picture() -> Image.Image:
        raise SampleError(f"Sample {record.sample} was made from a record, which has no picture.")

    return Sample(
        id=record.sample,
        question=record.question,
        image=no_picture,
        answers=tuple(record.answers),
        choices=tuple(record.choices),
        kind=record.kind,
        cluster=record.cluster,
        meta=record.meta,
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """Base of all tasks; the options are fields, and they enter every record's key.

    Args:
        limit: how many samples; ``None``: all. What belongs together (two MME questions, the
            shifts of one MMBench question) stays together, so it may be a few fewer.
        seed: with a limit, 0 takes the first samples of the file, as lmms-eval's ``--limit``; any
            other number draws them at random. Order is that of the file either way.
    """

    name: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    metric_name: ClassVar[str] = "exact_match"
    unit: ClassVar[str] = "%"  # of the score, or "points"
    max_new_tokens: ClassVar[int] = 16
    generates: ClassVar[bool] = True
    GROUP: ClassVar[str] = ""  # of tasks whose average stands in reports beside that of all

    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        object.__setattr__(self, "limit", plain(self.limit))
        object.__setattr__(self, "seed", plain(self.seed))
        if self.limit is not None and (isinstance(self.limit, bool) or self.limit < 1):
            raise ConfigError(f"limit counts samples and is at least 1, got {self.limit!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed is a whole number from 0, got {self.seed!r}.")

    @property
    def scored(self) -> bool:
        """Whether there are references; else answers are collected to be handed in somewhere."""
        return True

    def samples(self) -> Sequence[Sample]:
        """Return the samples, in an order that never changes.

        Raises:
            ConfigError: the data is missing or has another form; the message says what to do.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def notes(self) -> Sequence[str]:
        """Return what whoever starts a run should know of the data, before the first question."""
        return ()

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the text of the user's turn, without a placeholder for the picture.

        Args:
            sample: what is asked.
            style: ``"llava15"``: the words LLaVA-1.5 was evaluated with; ``"chat"``: for models
                that follow instructions through a chat template; ``"plain"``: the question alone.

        Raises:
            ConfigError: unknown style.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read the answer from a model's output."""
        raise NotImplementedError  # pragma: no cover - abstract

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return the score of one answer, in [0, 1]."""
        raise NotImplementedError  # pragma: no cover - abstract

    def metric(self) -> Metric:
        """Return the metric of this task: ``update(texts, samples)``; ``compute()["score"]``."""
        from visprune.eval.metrics.task import TaskMetric

        return TaskMetric(self)

    def aggregate(
        self, records: Sequence[Scored], *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:
        """Return the task's figures, in the unit they are published in; ``"score"`` leads.

        Args:
            records: of one cell; each sample once.
            errors_count_as_wrong: score records that hold an error 0 instead of leaving them out.

        Returns:
            ``{"score": percent, "score/KIND": percent ...}`` unless the task says otherwise;
            nothing can be said of no records: ``{}``.
        """
        totals: dict[str, list[float]] = {}
        kinds = {record.kind for record in records}
        for record in records:
            if record.score is None and not errors_count_as_wrong:
                continue
            names = ["score"] + ([f"score/{record.kind}"] if len(kinds) > 1 else [])
            for name in names:
                totals.setdefault(name, []).append(record.score or 0.0)
        return {name: 100.0 * float(np.mean(values)) for name, values in totals.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"task": name, "version": VERSION, **options}``, enough to build it again."""
        return {"task": self.name, "version": self.VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_params(cls, **params: Any) -> Self:
        """Build the task from its options.

        Raises:
            ConfigError: an option is unknown (the message suggests the nearest) or missing.
        """
        fields = dataclasses.fields(cls)
        allowed = [f.name for f in fields]
        for key in params:
            if key not in allowed:
                raise ConfigError(
                    f"The task {cls.name} has no option {key!r}.{did_you_mean(key, allowed)} "
                    f"Options: {', '.join(allowed)}."
                )
        for f in fields:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and f.name not in params:
                raise ConfigError(f"The task {cls.name} needs the option {f.name!r}.")
        return cls(**params)

    def _chosen(self, groups: Sequence[str]) -> list[int]:
        """Apply ``limit`` and ``seed``: the numbers of the samples to take, ascending.

        Args:
            groups: for each sample, what it must stay together with (its own id if nothing).
        """
        if self.limit is None or self.limit >= len(groups):
            return list(range(len(groups)))
        members: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            members.setdefault(group, []).append(number)
        order = list(members)
        if self.seed:
            order = [order[i] for i in np.random.default_rng(self.seed).permutation(len(order))]
        chosen: list[int] = []
        for group in order:
            if len(chosen) + len(members[group]) > self.limit:
                break
            chosen += members[group]
        if not chosen:
            raise ConfigError(
                f"limit={self.limit} is less than the {len(members[order[0]])} samples of "
                f"{self.name} that belong together; set it to at least that many."
            )
        return sorted(chosen)


def check_option(task: str, option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless an option of a task has one of the allowed values."""
    if value not in allowed:
        raise ConfigError(
            f"The task {task} has no {option} {value!r}.{did_you_mean(str(value), allowed)} "
            f"Allowed: {', '.join(allowed)}."
        )


tasks = Registry("task", TABLE, group="visprune.tasks")


def list_tasks() -> list[str]:
    """Names that :func:`get_task` takes."""
    return list(tasks.names())


def get_task(task: str | Task, **options: Any) -> Task:
    """Build a task from its name and options, or return one that is already built.

    Raises:
        ConfigError: unknown name or option (with a suggestion), or a value out of range.
    """
    if isinstance(task, Task):
        if options:
            raise ConfigError(
                f"The task {task.name} is already built; set {', '.join(options)} on it, or pass "
                f"its name."
            )
        return task
    if not isinstance(task, str):
        raise ConfigError(
            f"A task is a name or a Task, got {type(task).__name__}. "
            f"Names: {', '.join(list_tasks())}."
        )
    return tasks.get(task).from_params(**options)
