# SPDX-License-Identifier: Apache-2.0
"""What a task reads of a record when it sums up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Scored"]


class Scored(Protocol):
    """A record, or anything else that has its fields; ``score`` is ``None`` after an error."""

    @property
    def sample(self) -> str:
        """Id of the sample."""

    @property
    def kind(self) -> str:
        """Kind of the sample."""

    @property
    def cluster(self) -> str:
        """Picture of the sample."""

    @property
    def answers(self) -> Sequence[str]:
        """References."""

    @property
    def text(self) -> str | None:
        """What the model gave."""

    @property
    def answer(self) -> str | None:
        """What was parsed."""

    @property
    def score(self) -> float | None:
        """Score in [0, 1]."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """The sample's ``meta``."""
