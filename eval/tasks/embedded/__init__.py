# SPDX-License-Identifier: Apache-2.0
"""The embedded question set: pictures and questions made by code, the same on every machine.

A picture has 3 to 6 objects, each with a shape, a colour and a printed digit, on a textured
background with lines and blobs. Its questions have one right answer of one word. Splits draw from
disjoint seed spaces, so they share no picture.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.tasks.embedded.draw import draw_scene, patch_owner
from visprune.eval.tasks.embedded.questions import ANSWERS, KINDS, ask, questions_words
from visprune.eval.tasks.embedded.scene import (
    COLORS,
    DIGITS,
    LAYOUTS,
    PATCH,
    SHAPES,
    Layout,
    SceneObject,
    sample_scene,
)

VERSION = 1
SIDE = 192  # pixels: 24 x 24 patches of 8
SPLITS = ("train", "validation", "test")

__all__ = [
    "ANSWERS",
    "COLORS",
    "DIGITS",
    "KINDS",
    "LAYOUTS",
    "PATCH",
    "SHAPES",
    "SIDE",
    "SPLITS",
    "VERSION",
    "Layout",
    "Question",
    "Scene",
    "SceneObject",
    "blind_floor",
    "draw_picture",
    "load",
    "make_sample",
    "words",
]


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        kind: One of :data:`KINDS`.
        text: The question, words separated by single blanks.
        answer: The right answer, one word.
        id: Unique over all splits and layouts: the picture's and a number.
    """

    kind: str
    text: str
    answer: str
    id: str


@dataclass(frozen=True)
class Scene:
    """A drawn picture, what is in it and what is asked about it.

    Attributes:
        id: ``split/index``; ``layout/split/index`` where the layout is not the plain one.
        pixels: uint8 ``[192, 192, 3]``.
        objects: What is in it.
        questions: At most ``per_kind`` per kind; a kind that has no well-posed question is absent.
    """

    id: str
    pixels: np.ndarray
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...]

    @property
    def image(self) -> Image.Image:
        """The picture as PIL image (RGB, 192 x 192)."""
        return Image.fromarray(self.pixels)

    @property
    def patch_owner(self) -> np.ndarray:
        """Index of the object that each patch shows, -1 for none, int64 ``[24, 24]``."""
        return patch_owner(list(self.objects), SIDE)


def make_sample(
    split: str,
    index: int,
    per_kind: int | Mapping[str, int] = 1,
    kinds: Sequence[str] = KINDS,
    draw: bool = True,
    layout: str = "plain",
) -> Scene:
    """Make one picture with its questions; the same arguments always give the same.

    Args:
        split: One of :data:`SPLITS`.
        index: Number of the picture in its split, from 0.
        per_kind: Questions to ask of each kind, or a number by kind; repeated texts are dropped.
        kinds: Kinds to ask.
        draw: Whether to paint it; without, ``pixels`` is empty and objects and questions the same.
        layout: ``"plain"``, or ``"dense"``: more objects, and smaller ones.

    Returns:
        The picture.

    Raises:
        ConfigError: If the split, a kind or the layout does not exist.
    """
    _check(split, SPLITS, "split")
    _check(layout, tuple(LAYOUTS), "layout")
    for kind in (*kinds, *(() if isinstance(per_kind, int) else per_kind)):
        _check(kind, KINDS, "kind")
    space = [VERSION, SPLITS.index(split), index]
    if layout != "plain":
        space.append(list(LAYOUTS).index(layout))
    seeds = np.random.SeedSequence(space).generate_state(3)
    objects = sample_scene(np.random.default_rng(seeds[0]), SIDE, LAYOUTS[layout])
    asked: dict[str, tuple[str, str]] = {}
    for kind in kinds:
        rng = np.random.default_rng([seeds[1], KINDS.index(kind)])
        for _ in range(per_kind if isinstance(per_kind, int) else per_kind.get(kind, 0)):
            found = ask(rng, kind, objects, SIDE)
            if found is not None:
                asked.setdefault(found[0], (kind, found[1]))
    name = f"{split}/{index}" if layout == "plain" else f"{layout}/{split}/{index}"
    questions = tuple(
        Question(kind, text.replace(" ?", "?"), answer, f"{name}/{number}")
        for number, (text, (kind, answer)) in enumerate(asked.items())
    )
    pixels = np.zeros((0, 0, 3), np.uint8)
    if draw:
        pixels = draw_scene(np.random.default_rng(seeds[2]), objects, SIDE)
    return Scene(name, pixels, tuple(objects), questions)


def draw_picture(
    rng: np.random.Generator, side: int, low: int, high: int
) -> tuple[np.ndarray, list[SceneObject], np.ndarray]:
    """A picture of any size without questions, for pretraining a vision tower.

    Args:
        rng: Source of randomness; use a seed of your own, none of the splits'.
        side: Side, pixels, a multiple of 8.
        low: Fewest objects.
        high: Most objects.

    Returns:
        Pixels uint8 ``[side, side, 3]``, objects, owner of each patch ``[side / 8, side / 8]``.
    """
    objects = sample_scene(rng, side, Layout(low, high))
    return draw_scene(rng, objects, side), objects, patch_owner(objects, side)


def load(split: str, limit: int | None = 2100, per_kind: int = 1) -> list[Scene]:
    """The first pictures of a split, with ``limit`` questions together.

    Args:
        split: One of :data:`SPLITS`.
        limit: Number of questions; None stands for the default of 2,100.
        per_kind: Questions per kind and picture.

    Returns:
        Pictures; the last one may have lost questions so that the limit is met exactly.

    Raises:
        ConfigError: If the split does not exist or the limit is below 1.
    """
    limit = 2100 if limit is None else limit
    if limit < 1:
        raise ConfigError(f"limit is {limit}; it counts questions and must be at least 1.")
    pictures: list[Scene] = []
    left = limit
    while left > 0:
        picture = make_sample(split, len(pictures), per_kind)
        kept = picture.questions[:left]
        pictures.append(Scene(picture.id, picture.pixels, picture.objects, kept))
        left -= len(kept)
    return pictures


def blind_floor(pictures: Sequence[Scene], prefix_words: int | None = None) -> dict[str, float]:
    """Accuracy of always giving the commonest answer, which needs no picture.

    Args:
        pictures: Pictures with their questions.
        prefix_words: None to take the commonest answer of the kind; else the commonest among
            questions of the kind that share this many first words (many words on few questions
            overstate the floor: each question then has its own majority).

    Returns:
        Share of right answers per kind, and over all questions under ``"all"``.
    """
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for picture in pictures:
        for question in picture.questions:
            prefix = " ".join(question.text.split()[: prefix_words or 0])
            answers[question.kind, prefix][question.answer] += 1
    right, total = Counter[str](), Counter[str]()
    for (kind, _), counts in answers.items():
        for key in (kind, "all"):
            right[key] += max(counts.values())
            total[key] += counts.total()
    return {key: right[key] / total[key] for key in (*KINDS, "all") if total[key]}


def words() -> tuple[str, ...]:
    """Every word of questions and answers, sorted: the vocabulary a model needs."""
    return questions_words()


def _check(name: str, allowed: Sequence[str], what: str) -> None:
    if name not in allowed:
        hint = did_you_mean(name, allowed)
        raise ConfigError(f"Unknown {what} {name!r}.{hint} Allowed: {', '.join(allowed)}.")


def __getattr__(name: str) -> Any:
    if name == "Picture":
        warnings.warn(
            "visprune.eval.tasks.embedded.Picture is called Scene: a drawn picture, its objects "
            "and questions.",
            DeprecationWarning, stacklevel=2,
        )  # fmt: skip
        return Scene
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
