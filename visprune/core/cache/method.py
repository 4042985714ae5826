# SPDX-License-Identifier: Apache-2.0
"""What a method that acts on the cache is: a frozen dataclass that names its four parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from visprune.core.budget import WORDS, Budget, Schedule, Stage
from visprune.core.cache.parts import Amount, Eviction, Score
from visprune.core.method import Context, ModelSpec, PruningMethod
from visprune.core.numeric import is_whole
from visprune.core.selection import Selection
from visprune.core.site import Site
from visprune.core.tokens import VisualTokens
from visprune.errors import BudgetError, ConfigError, did_you_mean


@dataclass(frozen=True)
class CacheStage(Stage):
    """A stage at the cache, with its parts.

    Attributes:
        eviction: what is done there.
    """

    eviction: Eviction = field(default_factory=lambda: Eviction(Score()))


@dataclass(frozen=True, kw_only=True)
class CacheMethod(PruningMethod):
    """Base of the methods that shrink what a model remembers of a prompt it has read.

    The prompt itself is read whole: its logits are those of the untouched model.

    Args:
        num_keep: visual tokens of one picture that each key head keeps (on average, where heads or
            layers keep different numbers).
        keep_ratio: the same as a share; with ``scope="prompt"`` of all slots of the prompt.
        num_keep_per_frame: the same as ``num_keep``, of each frame of a clip.
        max_cache: slots of the prompt in all, protected ones included; one of the four is given.
        scope: ``"visual"``: text is never touched, and budgets count visual tokens; ``"prompt"``:
            as the papers on text, everything counts and may leave.
    """

    decides: ClassVar[bool] = False  # the method knows itself how much stays
    closes_up: ClassVar[bool] = False  # positions of what stays can close up over what left

    num_keep: int | None = None
    keep_ratio: float | None = None
    num_keep_per_frame: int | None = None
    max_cache: int | None = None
    scope: Literal["visual", "prompt"] = "visual"

    def __post_init__(self) -> None:
        """Check the budget and the scope."""
        super().__post_init__()
        for name, value in vars(self).items():
            object.__setattr__(self, name, _frozen(value))
        if self.scope not in ("visual", "prompt"):
            raise ConfigError(
                f"scope is 'visual' or 'prompt', got {self.scope!r}."
                + did_you_mean(str(self.scope), ("visual", "prompt"))
            )
        if self.positions == "compact" and not self.closes_up:
            raise ConfigError(
                f"{self.name} takes no positions='compact': keys that are stored keep their phase. "
                f"Use positions='original'."
            )
        self._check_amount()

    def _check_amount(self) -> None:
        given = {name: getattr(self, name) for name in WORDS if getattr(self, name) is not None}
        if self.max_cache is None:
            if given or not self.decides:
                Budget(**given)
        elif given:
            told = ", ".join(f"{name}={value}" for name, value in given.items())
            raise BudgetError(
                f"A budget of a cache is num_keep, keep_ratio, num_keep_per_frame or max_cache; "
                f"got {told}, max_cache={self.max_cache}. Give exactly one."
            )
        elif not is_whole(self.max_cache) or self.max_cache < 1:
            raise BudgetError(
                f"max_cache is a whole number of slots, at least 1; got {self.max_cache!r}."
            )
        for name in ("num_keep", "num_keep_per_frame"):
            if self.scope == "prompt" and name in given:
                raise BudgetError(
                    f"{name} counts visual tokens; with scope='prompt' give max_cache (slots of "
                    f"the prompt) or keep_ratio (their share)."
                )

    @classmethod
    def example(cls) -> Self:
        """The least that it can be built with."""
        return cls() if cls.decides else super().example()

    @property
    def amount(self) -> Amount:
        """How much stays."""
        return Amount(
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            num_keep_per_frame=self.num_keep_per_frame,
            max_cache=self.max_cache,
            visual=self.scope == "visual",
            strict=self.strict,
        )

    def eviction(self, spec: ModelSpec) -> Eviction:
        """The method's parts."""
        raise NotImplementedError  # pragma: no cover - abstract

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage, at the cache."""
        return (CacheStage(Site.cache(), eviction=self.eviction(spec)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """There is nothing to choose while the prompt is read.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.name} acts at the cache and chooses no tokens of a sequence.")


@dataclass(frozen=True, kw_only=True)
class Recurring(CacheMethod):
    """Base of the methods whose rule can go on while tokens are decoded.

    Args:
        every: how many tokens the cache grows by, beyond ``max_cache``, before it is cut to
            ``max_cache`` slots again (1: at every token, as published); with ``scope="prompt"``.
            What is decoded may leave then, too. ``None``: the cache is cut once, at the end of the
            prompt. Tokens that come together (a later turn, guesses of an assistant) wait for the
            next one that comes alone.
    """

    every: int | None = None

    def __post_init__(self) -> None:
        """Check that there is a size to keep to."""
        super().__post_init__()
        if self.every is None:
            return
        if not is_whole(self.every) or self.every < 1:
            raise ConfigError(
                f"every is a whole number of tokens, at least 1; got {self.every!r}. None evicts "
                f"once, at the end of the prompt."
            )
        if self.scope != "prompt" or self.max_cache is None:
            raise ConfigError(
                f"every={self.every} holds a cache to a number of slots, of which any may leave; "
                f"got scope={self.scope!r}, max_cache={self.max_cache}. Give scope='prompt' and "
                f"max_cache."
            )


def _frozen(value: Any) -> Any:
    """Lists as tuples, which have a hash: those of a file are lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
