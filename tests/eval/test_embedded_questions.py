# SPDX-License-Identifier: Apache-2.0
"""The embedded question set: determinism, well-posed questions, balance, splits that stay apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from visprune.errors import ConfigError
from visprune.eval.tasks.base import get_task
from visprune.eval.tasks.embedded import (
    ANSWERS,
    COLORS,
    KINDS,
    LAYOUTS,
    PATCH,
    SHAPES,
    SIDE,
    SPLITS,
    Scene,
    SceneObject,
    blind_floor,
    draw_picture,
    load,
    make_sample,
    words,
)
from visprune.eval.tasks.embedded.draw import RGB, shape_mask
from visprune.eval.tasks.embedded.questions import PLURALS


@pytest.fixture(scope="module")
def symbolic() -> list[Scene]:
    """600 test pictures with two questions of each kind, not painted."""
    return [make_sample("test", i, per_kind=2, draw=False) for i in range(600)]


@pytest.fixture(scope="module")
def dense() -> list[Scene]:
    """200 pictures of the denser layout."""
    return [make_sample("test", i, per_kind=2, draw=False, layout="dense") for i in range(200)]


def named(picture: Scene, phrase: str) -> list[SceneObject]:
    """The objects that a phrase such as "red circle", "circle" or "red object" fits."""
    fits = list(picture.objects)
    for word in phrase.split():
        if word in COLORS:
            fits = [o for o in fits if o.color == word]
        elif word in SHAPES:
            fits = [o for o in fits if o.shape == word]
        else:
            assert word in ("object", "objects")
    return fits


def solve(picture: Scene, kind: str, text: str) -> str:
    """Answer a question from the objects alone, by its words; written apart from the generator."""
    body = text.removesuffix("?")
    if kind == "existence":
        return "yes" if named(picture, body.removeprefix("is there a ")) else "no"
    if kind == "count":
        phrase = body.removeprefix("how many ").removesuffix(" are there")
        singular = {plural: shape for shape, plural in PLURALS.items()}.get(phrase, phrase)
        return ("zero", "one", "two", "three", "four")[len(named(picture, singular))]
    if kind == "relation":
        first, second = body.removeprefix("on which side of the ").split(" is the ")
        (other,), (item,) = named(picture, first), named(picture, second)
        (x, y), (u, v) = item.center, other.center
        assert max(abs(x - u), abs(y - v)) > 2 * min(abs(x - u), abs(y - v))
        if abs(x - u) > abs(y - v):
            return "right" if x > u else "left"
        return "below" if y > v else "above"
    (item,) = named(picture, body.split(" the ")[-1])
    if kind == "position":
        x, y = item.center
        assert min(abs(x - SIDE / 2), abs(y - SIDE / 2)) >= 1.5 * PATCH
        return ("bottom" if y > SIDE / 2 else "top") + ("-right" if x > SIDE / 2 else "-left")
    return {"color": item.color, "shape": item.shape, "read": item.digit}[kind]


def test_same_arguments_same_sample() -> None:
    first, second = make_sample("test", 5), make_sample("test", 5)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.objects == second.objects
    assert first.questions == second.questions
    assert not np.array_equal(first.pixels, make_sample("test", 6).pixels)


def test_painting_changes_no_question() -> None:
    assert make_sample("train", 3).questions == make_sample("train", 3, draw=False).questions


def test_a_kind_is_asked_the_same_with_or_without_the_others() -> None:
    alone = make_sample("test", 8, kinds=["read"], draw=False).questions
    among = [q for q in make_sample("test", 8, draw=False).questions if q.kind == "read"]
    assert [(q.text, q.answer) for q in alone] == [(q.text, q.answer) for q in among]


def test_a_number_by_kind() -> None:
    asked = make_sample("test", 4, per_kind={"read": 3}, draw=False).questions
    assert {q.kind for q in asked} == {"read"}
    assert 1 <= len(asked) <= 3
    with pytest.raises(ConfigError, match="Did you mean 'read'"):
        make_sample("test", 4, per_kind={"raed": 3})


def test_splits_share_no_picture() -> None:
    seen = {split: {make_sample(split, i).pixels.tobytes() for i in range(60)} for split in SPLITS}
    assert all(len(pictures) == 60 for pictures in seen.values())
    assert len(set().union(*seen.values())) == 60 * len(SPLITS)
    scenes = {s: {make_sample(s, i, draw=False).objects for i in range(400)} for s in SPLITS}
    assert len(set().union(*scenes.values())) == 400 * len(SPLITS)


def test_every_answer_follows_from_the_objects(symbolic: list[Scene], dense: list[Scene]) -> None:
    for picture in (*symbolic, *dense):
        for question in picture.questions:
            assert solve(picture, question.kind, question.text) == question.answer, question


def test_objects_are_apart_and_have_different_names(symbolic: list[Scene]) -> None:
    for picture in symbolic:
        objects = picture.objects
        assert 3 <= len(objects) <= 6
        assert len({o.name for o in objects}) == len(objects)
        assert all(3 * PATCH <= o.size <= 6 * PATCH for o in objects)
        owner = picture.patch_owner
        assert set(range(len(objects))) <= set(owner.ravel().tolist())
        taken = np.zeros((SIDE, SIDE), int)
        for o in objects:
            taken[o.top : o.top + o.size, o.left : o.left + o.size] += 1
        assert taken.max() == 1


def test_dense_pictures_hold_more_and_smaller_objects_and_are_others(
    symbolic: list[Scene], dense: list[Scene]
) -> None:
    layout = LAYOUTS["dense"]
    counts = [len(picture.objects) for picture in dense]
    assert max(counts) == layout.high
    assert np.mean([count >= layout.low for count in counts]) > 0.95, "some find no room"
    sizes = [o.size for picture in dense for o in picture.objects]
    assert (min(sizes), max(sizes)) == (layout.smallest, layout.largest)
    for picture in dense:
        assert len({o.name for o in picture.objects}) == len(picture.objects)
    assert not {p.objects for p in dense} & {p.objects for p in symbolic}
    assert not {p.id for p in dense} & {p.id for p in symbolic}
    assert {question.kind for p in dense for question in p.questions} == set(KINDS)
    with pytest.raises(ConfigError, match="Did you mean 'dense'"):
        make_sample("test", 0, layout="dens")


def test_the_task_asks_about_the_layout_that_it_is_given() -> None:
    asked = {name: get_task("embedded", layout=name, limit=30).samples() for name in LAYOUTS}
    for name, samples in asked.items():
        drawn = make_sample("test", 0, layout=name)
        assert samples[0].question == drawn.questions[0].text
        assert np.array_equal(np.asarray(samples[0].image()), drawn.pixels)
    assert not {x.id for x in asked["plain"]} & {x.id for x in asked["dense"]}
    with pytest.raises(ConfigError, match=r"no layout 'densest'.*Did you mean 'dense'"):
        get_task("embedded", layout="densest")


def test_blind_answers_stay_near_the_floor(symbolic: list[Scene]) -> None:
    floor = blind_floor(symbolic)
    for kind, answers in ANSWERS.items():
        assert 1 / len(answers) <= floor[kind] <= 1 / len(answers) + 0.06, (kind, floor[kind])
    assert floor["all"] < 0.3
    # The first words name the kind and little more: nothing to gain from them.
    assert blind_floor(symbolic, prefix_words=3)["all"] < floor["all"] + 0.02


def test_blind_floor_counts_the_majority() -> None:
    pictures = load("test", 50)
    floor = blind_floor(pictures)
    answers = Counter(q.answer for p in pictures for q in p.questions if q.kind == "existence")
    assert floor["existence"] == max(answers.values()) / answers.total()


def test_load_meets_the_limit_with_all_kinds() -> None:
    pictures = load("validation", 100)
    questions = [q for p in pictures for q in p.questions]
    assert len(questions) == len({q.id for q in questions}) == 100
    assert {q.kind for q in questions} == set(KINDS)
    assert all(
        set(q.text.replace("?", " ?").split()) | {q.answer} <= set(words()) for q in questions
    )


def test_painted_objects_have_their_colour_where_the_labels_say() -> None:
    for index in range(20):
        picture = make_sample("test", index)
        for item in picture.objects:
            rows = slice(item.top, item.top + item.size)
            cols = slice(item.left, item.left + item.size)
            inside = picture.pixels[rows, cols][shape_mask(item.shape, item.size) > 0.99]
            middle = np.median(inside, axis=0)  # the digit is darker but covers the lesser part
            nearest = min(RGB, key=lambda name: float(np.abs(middle - RGB[name]).sum()))
            assert nearest == item.color


def test_the_digit_is_painted() -> None:
    picture = make_sample("test", 0)
    item = picture.objects[0]
    box = picture.pixels[item.top : item.top + item.size, item.left : item.left + item.size]
    middle = box[item.size // 3 : -item.size // 4, item.size // 3 : -item.size // 3]
    assert (middle.max(axis=-1) < 60).sum() > 8


def test_draw_picture_labels_windows() -> None:
    pixels, objects, owner = draw_picture(np.random.default_rng(0), 96, 2, 5)
    assert pixels.shape == (96, 96, 3)
    assert owner.shape == (12, 12)
    assert owner.max() == len(objects) - 1


@pytest.mark.parametrize("call", [lambda: make_sample("tset", 0), lambda: load("tset", 5)])
def test_unknown_split_suggests(call: object) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'test'"):
        call()  # type: ignore[operator]


def test_unknown_kind_suggests() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'color'"):
        make_sample("test", 0, kinds=["colour"])


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        load("test", 0)


def test_former_names_go_on_with_a_warning() -> None:
    from visprune.eval import models
    from visprune.eval.tasks import embedded

    with pytest.warns(DeprecationWarning, match="ModelEntry"):
        assert models.ModelSpec is models.ModelEntry
    with pytest.warns(DeprecationWarning, match="Scene"):
        assert embedded.Picture is Scene
    with pytest.raises(AttributeError):
        _ = models.Spec
