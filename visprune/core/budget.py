# SPDX-License-Identifier: Apache-2.0
"""How many tokens of one image survive, and at which sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from visprune.core.numeric import is_number, is_whole, plain
from visprune.core.signals.base import Signal
from visprune.core.site import Site
from visprune.errors import BudgetError

Rounding = Literal["round", "floor"]
WORDS = ("num_keep", "keep_ratio", "num_keep_per_frame")


@dataclass(frozen=True)
class Budget:
    """The number of visual tokens of one image that are **kept**.

    Exactly one of the three is given. ``keep_ratio`` refers to the image's own original count.

    Attributes:
        num_keep: tokens kept, at least 1.
        keep_ratio: fraction kept, in (0, 1].
        num_keep_per_frame: tokens kept for each frame of a clip, at least 1: a number once the clip
            is known (:func:`per_clip`).
        rounding: how ``keep_ratio * n`` becomes a count; Python's ``round`` takes halves to even.
    """

    num_keep: int | None = None
    keep_ratio: float | None = None
    num_keep_per_frame: int | None = None
    rounding: Rounding = "round"

    def __post_init__(self) -> None:
        """Reject a budget that is missing, double or out of range."""
        given = {name: getattr(self, name) for name in WORDS if getattr(self, name) is not None}
        if len(given) != 1:
            told = ", ".join(f"{name}={value}" for name, value in given.items())
            raise BudgetError(
                f"A budget is num_keep (tokens of one image that stay) or keep_ratio (the fraction "
                f"that stays), or of a clip num_keep_per_frame (tokens of each frame); got "
                f"{'both: ' + told if given else 'neither'}. Give exactly one."
            )
        for name in ("num_keep", "num_keep_per_frame"):
            count = getattr(self, name)
            if count is not None and not is_whole(count):
                raise BudgetError(f"{name} is a whole number of tokens, got {count!r}.")
            if count is not None and count < 1:
                raise BudgetError(f"{name} must be at least 1, got {count}.")
            object.__setattr__(self, name, plain(count))
        ratio = self.keep_ratio
        if ratio is not None and not (is_number(ratio) and 0.0 < ratio <= 1.0):
            raise BudgetError(
                f"keep_ratio is the fraction of tokens that stays, in (0, 1]; got {ratio!r}. "
                f"To keep a number of tokens, use num_keep."
            )
        object.__setattr__(self, "keep_ratio", plain(ratio))

    @classmethod
    def maybe(
        cls,
        num_keep: int | None = None,
        keep_ratio: float | None = None,
        num_keep_per_frame: int | None = None,
        rounding: Rounding = "round",
    ) -> Self | None:
        """The budget of a method that can do without: ``None`` where nothing is given."""
        if num_keep is keep_ratio is num_keep_per_frame is None:
            return None
        return cls(num_keep, keep_ratio, num_keep_per_frame, rounding)

    def slots(self, entering: int, original: int | None = None) -> int:
        """Return the length after the stage: the tokens kept."""
        return self.resolve(entering, original)

    def resolve(self, entering: int, original: int | None = None, *, strict: bool = False) -> int:
        """Return the count kept of the ``entering`` tokens, at least 1.

        Args:
            entering: tokens that enter the stage.
            original: tokens that the image had at first, which the budget refers to; ``None``:
                those that enter.
            strict: refuse a budget that exceeds ``original``.

        Raises:
            BudgetError: ``strict`` and ``num_keep`` exceeds the image's tokens.
        """
        num_tokens = entering if original is None else original
        return min(self._of(num_tokens, strict), entering)

    def clamps(self, original: int) -> bool:
        """Whether the budget is more than an image of ``original`` tokens has."""
        return self.num_keep is not None and self.num_keep > original

    def _of(self, num_tokens: int, strict: bool) -> int:
        if self.keep_ratio is not None:
            exact = self.keep_ratio * num_tokens
            wanted = round(exact) if self.rounding == "round" else math.floor(exact + 1e-9)
            return min(max(wanted, 1), num_tokens)
        if self.num_keep is None:
            raise BudgetError(
                f"num_keep_per_frame={self.num_keep_per_frame} counts the frames of a clip, which "
                f"are not known here. Use num_keep or keep_ratio."
            )
        if strict and self.num_keep > num_tokens:
            raise BudgetError(
                f"num_keep={self.num_keep} exceeds the {num_tokens} visual tokens of an image. Use "
                f"num_keep <= {num_tokens}, keep_ratio, or strict=False to keep all of such images."
            )
        return min(self.num_keep, num_tokens)

    def scaled(self, factor: float, rounding: Rounding) -> Budget:
        """Return the budget times ``factor`` (earlier stages of a pyramid keep more)."""
        for name in ("num_keep", "num_keep_per_frame"):
            count = getattr(self, name)
            if count is not None:
                return Budget(**{name: max(1, round(count * factor))}, rounding=rounding)
        return Budget(keep_ratio=min(1.0, (self.keep_ratio or 0.0) * factor), rounding=rounding)


def per_clip(num_keep_per_frame: int, frames: Sequence[int]) -> int:
    """Tokens that a clip keeps, of so many for each of its frames.

    Which of the clip's tokens these are is the method's choice: a frame may keep more than another.

    Args:
        num_keep_per_frame: tokens.
        frames: tokens that each frame of the clip has; none of a picture.

    Raises:
        BudgetError: it is no clip, or its frames differ in their tokens.
    """
    if not frames:
        raise BudgetError(
            f"num_keep_per_frame={num_keep_per_frame} counts tokens of each frame of a clip, and "
            f"this is a picture. Use num_keep or keep_ratio; pictures that are frames of a clip "
            f"are told by clip_frames=... beside the model's inputs."
        )
    if len(set(frames)) > 1:
        raise BudgetError(
            f"num_keep_per_frame={num_keep_per_frame} counts tokens of frames that are alike; "
            f"those of this clip have {min(frames)} to {max(frames)} tokens. Use num_keep (of the "
            f"whole clip) or keep_ratio."
        )
    return num_keep_per_frame * len(frames)


@dataclass(frozen=True)
class StepBudget:
    """What one layer keeps, in the terms of the papers on vision transformers.

    Exactly one of the three is given.

    Attributes:
        num_drop: tokens that leave, at most half of those that enter (ToMe's r).
        keep_ratio: fraction kept, in (0, 1], of the tokens that enter or of the picture's own.
        num_keep: tokens kept at the end of ``share``.
        share: how far of the way to ``num_keep`` this step goes, by equal factors, in (0, 1].
        of: what ``keep_ratio`` refers to.
        rounding: how the fraction becomes a count.
        extra: slots besides the tokens kept, where any leave (EViT's fused token).
    """

    num_drop: int | None = None
    keep_ratio: float | None = None
    num_keep: int | None = None
    share: float = 1.0
    of: Literal["entering", "original"] = "entering"
    rounding: Literal["ceil", "floor"] = "ceil"
    extra: int = 0

    def slots(self, entering: int, original: int) -> int:
        """Return the length after the step: the tokens kept, and what is made of the others."""
        kept = self.resolve(entering, original)
        return kept + self.extra if kept < entering else kept

    def clamps(self, original: int) -> bool:
        """Never: a step is at most what enters."""
        return False

    def resolve(self, entering: int, original: int, *, strict: bool = False) -> int:
        """Return the count kept of ``entering`` tokens, at least 1."""
        if self.num_drop is not None:  # as in ToMe's code, r is cut to half of what there is
            return entering - min(self.num_drop, entering // 2)
        if self.num_keep is not None:
            wanted = round(original ** (1.0 - self.share) * self.num_keep**self.share)
            return min(max(wanted, min(self.num_keep, original)), entering)
        exact = (self.keep_ratio or 0.0) * (entering if self.of == "entering" else original)
        wanted = math.ceil(exact) if self.rounding == "ceil" else int(exact)
        return min(max(wanted, 1), entering)


@dataclass(frozen=True)
class Stage:
    """One place where a method acts.

    Attributes:
        site: where.
        budget: tokens that each image keeps from here on, a ``StepBudget`` inside an encoder or
            a decoder; ``None``: the method decides itself how many (:meth:`Selection.where`).
        needs: signals that the method is shown, and refuses a model without.
        wants: signals that it is shown where the model has them.
        restores: inside an encoder, on entering a layer: what leaves comes back behind the layer
            whose output is read (:meth:`Selection.returning`), and attention of so many layers,
            from this one on, sees all tokens; ``None``: what leaves is gone.
    """

    site: Site
    budget: Budget | StepBudget | None = None
    needs: tuple[Signal, ...] = ()
    wants: tuple[Signal, ...] = ()
    restores: int | None = None

    @property
    def signals(self) -> tuple[Signal, ...]:
        """Needs and wants."""
        return (*self.needs, *self.wants)


Schedule = tuple[Stage, ...]
