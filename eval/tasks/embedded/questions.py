# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene: seven kinds, each with one right answer of one word."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from visprune.eval.tasks.embedded.scene import COLORS, DIGITS, PATCH, SHAPES, SceneObject

COUNTS = ("zero", "one", "two", "three", "four")
REGIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
SIDES = ("left", "right", "above", "below")
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
ANSWERS = {
    "existence": ("yes", "no"),
    "color": COLORS,
    "shape": SHAPES,
    "count": COUNTS,
    "relation": SIDES,
    "position": REGIONS,
    "read": DIGITS,
}
KINDS = tuple(ANSWERS)
_CLEAR = 1.5 * PATCH  # pixels from a midline that leave no doubt about the quadrant
_STEEP = 2.0  # how much larger one offset must be than the other for a side to be named

Asked = tuple[str, str]
"""Question text and answer."""


def ask(rng: np.random.Generator, kind: str, objects: list[SceneObject], side: int) -> Asked | None:
    """Draw one question of a kind.

    Args:
        rng: Source of randomness.
        kind: One of :data:`KINDS`.
        objects: Objects of the picture.
        side: Side of the picture, pixels.

    Returns:
        Question text and answer, or None if this picture allows no well-posed one.
    """
    return _ASKERS[kind](rng, objects, side)


def questions_words() -> tuple[str, ...]:
    """Every word that questions and answers can contain, sorted."""
    templates = (
        "is there a ? what color is the object ? what shape is the how many objects are there ? "
        "on which side of the is the where is the what digit is on the"
    )
    words = set(templates.split()) | set(COLORS) | set(SHAPES) | set(PLURALS.values())
    return tuple(sorted(words.union(*ANSWERS.values())))


def _pick(rng: np.random.Generator, items: list) -> object:
    return items[int(rng.integers(len(items)))]


def _refer(rng: np.random.Generator, item: SceneObject, objects: list[SceneObject]) -> str:
    """One of the names that fit this object and no other."""
    names = [item.name, item.name]  # the full name, twice as likely as a short one
    if sum(o.color == item.color for o in objects) == 1:
        names.append(f"{item.color} object")
    if sum(o.shape == item.shape for o in objects) == 1:
        names.append(item.shape)
    return str(_pick(rng, names))


def _existence(rng: np.random.Generator, objects: list[SceneObject], side: int) -> Asked | None:
    """Half yes. Half of the no's recombine a colour and a shape that are both in the picture."""
    present = {o.name for o in objects}
    if rng.random() < 0.5:
        name = str(_pick(rng, sorted(present)))
        return f"is there a {name} ?", "yes"
    mixed = {f"{a.color} {b.shape}" for a in objects for b in objects} - present
    others = {f"{color} {shape}" for color in COLORS for shape in SHAPES} - present
    names = mixed if mixed and rng.random() < 0.5 else others
    return f"is there a {_pick(rng, sorted(names))} ?", "no"


def _color(rng: np.random.Generator, objects: list[SceneObject], side: int) -> Asked | None:
    shapes = [o.shape for o in objects]
    single = [o for o in objects if shapes.count(o.shape) == 1]
    if not single:
        return None
    item = single[int(rng.integers(len(single)))]
    return f"what color is the {item.shape} ?", item.color


def _shape(rng: np.random.Generator, objects: list[SceneObject], side: int) -> Asked | None:
    colors = [o.color for o in objects]
    single = [o for o in objects if colors.count(o.color) == 1]
    if not single:
        return None
    item = single[int(rng.integers(len(single)))]
    return f"what shape is the {item.color} object ?", item.shape


def _count(rng: np.random.Generator, objects: list[SceneObject], side: int) -> Asked | None:
    """Counts of a colour or a shape; the weights make the five answers about equally frequent.

    Two, three and four come from the scene's group, whose size is uniform over them.
    """
    by_color = [(f"{c} objects", sum(o.color == c for o in objects)) for c in COLORS]
    by_shape = [(PLURALS[s], sum(o.shape == s for o in objects)) for s in SHAPES]
    largest = min(max(n for _, n in by_color + by_shape), len(COUNTS) - 1)
    wanted = int(rng.choice([0, 1, largest], p=[0.2, 0.2, 0.6]))
    pools = [[(name, n) for name, n in pool if n == wanted] for pool in (by_color, by_shape)]
    pools = [pool for pool in pools if pool]
    if not pools:
        return None
    pool = pools[int(rng.integers(len(pools)))]
    name, count = pool[int(rng.integers(len(pool)))]
    return f"how many {name} are there ?", COUNTS[count]


def _relation(rng: np.random.Generator, objects: list[SceneObject], side: int) -> Asked | None:
    clear = []
    for item in objects:
        for other in objects:
            (x, y), (u, v) = item.center, other.center
            across, down = abs(x - u), abs(y - v)
            if item is not other and max(across, down) > _STEEP * min(across, down):
                clear.append((item, other))
    if not clear:
        return None
    item, other = clear[int(rng.integers(len(clear)))]
    (x, y), (u, v) = item.center, other.center
    answer = SIDES[int(x > u)] if abs(x - u) > abs(y - v) else SIDES[2 + int(y > v)]
    first, second = _refer(rng, other, objects), _refer(rng, item, objects)
    return f"on which side of the {first} is the {second} ?", answer


def _position(rng: np.random.Generator, objects: list[SceneObject], side: int) -> Asked | None:
    middle = side / 2
    clear = [o for o in objects if min(abs(c - middle) for c in o.center) >= _CLEAR]
    if not clear:
        return None
    item = clear[int(rng.integers(len(clear)))]
    x, y = item.center
    answer = REGIONS[2 * int(y > middle) + int(x > middle)]
    return f"where is the {_refer(rng, item, objects)} ?", answer


def _read(rng: np.random.Generator, objects: list[SceneObject], side: int) -> Asked | None:
    item = objects[int(rng.integers(len(objects)))]
    return f"what digit is on the {_refer(rng, item, objects)} ?", item.digit


_ASKERS: dict[str, Callable[[np.random.Generator, list[SceneObject], int], Asked | None]] = {
    "existence": _existence,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "position": _position,
    "read": _read,
}
