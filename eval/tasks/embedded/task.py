# SPDX-License-Identifier: Apache-2.0
"""The drawn questions as a task, for the embedded model and any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from visprune.errors import ConfigError
from visprune.eval.tasks import embedded, prompts
from visprune.eval.tasks.base import Parsed, PromptStyle, Sample, Task, check_option

__all__ = ["EmbeddedTask"]

_STRIDE = 1_000_000  # pictures between two question sets; none reaches into the next


@dataclass(frozen=True)
class _Drawn:
    """Draws a picture when called."""

    split: str
    index: int
    layout: str

    def __call__(self) -> Image.Image:
        return embedded.make_sample(self.split, self.index, layout=self.layout).image


@dataclass(frozen=True, kw_only=True)
class EmbeddedTask(Task):
    """Drawn pictures, questions of one word (seven kinds): offline, the same everywhere.

    Each ``seed`` is a question set of its own: other pictures, none shared.

    Args:
        split: ``"test"``, ``"validation"`` or ``"train"``.
        limit: number of questions.
        per_kind: questions of each kind per picture.
        layout: ``"plain"``: 3 to 6 objects of 24 to 44 pixels; ``"dense"``: 6 to 8 of 20 to 26,
            where methods that stand together on plain pictures come apart.
    """

    name: ClassVar[str] = "embedded"
    VERSION: ClassVar[int] = embedded.VERSION
    metric_name: ClassVar[str] = "exact_match"
    max_new_tokens: ClassVar[int] = 2  # a word and the end

    split: str = "test"
    limit: int | None = 2100
    per_kind: int = 1
    layout: str = "plain"

    def __post_init__(self) -> None:
        """Reject values outside their range."""
        super().__post_init__()
        check_option(self.name, "split", self.split, embedded.SPLITS)
        check_option(self.name, "layout", self.layout, tuple(embedded.LAYOUTS))
        if self.limit is None:
            raise ConfigError("The embedded questions never end; set limit, such as limit=2100.")
        if self.per_kind < 1:
            raise ConfigError(f"per_kind is at least 1, got {self.per_kind}.")

    def samples(self) -> Sequence[Sample]:
        """Return the questions; pictures are drawn when they are asked for."""
        found: list[Sample] = []
        index = self.seed * _STRIDE
        limit = self.limit or 0
        while len(found) < limit:
            picture = embedded.make_sample(
                self.split, index, self.per_kind, draw=False, layout=self.layout
            )
            for question in picture.questions[: limit - len(found)]:
                found.append(
                    Sample(
                        id=question.id,
                        question=question.text,
                        image=_Drawn(self.split, index, self.layout),
                        answers=(question.answer,),
                        kind=question.kind,
                        cluster=picture.id,
                    )
                )
            index += 1
        return found

    def prompt(self, sample: Sample, style: PromptStyle = "llava15") -> str:
        """Return the question; the embedded model was trained on ``"plain"``."""
        return prompts.short_answer(sample.question, style)

    def parse(self, text: str, sample: Sample) -> Parsed:
        """Read one word: the whole output (``"exact"``), or its first word (``"first_word"``)."""
        allowed = embedded.ANSWERS.get(sample.kind, ())
        words = text.lower().split()
        if len(words) == 1 and words[0] in allowed:
            return Parsed(words[0], "exact")
        if words and words[0].strip(".,!?:;\"'") in allowed:
            return Parsed(words[0].strip(".,!?:;\"'"), "first_word")
        return Parsed(None)

    def score(self, sample: Sample, parsed: Parsed) -> float:
        """Return 1 for the right word."""
        return float(parsed.answer in sample.answers)
