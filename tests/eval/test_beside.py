# SPDX-License-Identifier: Apache-2.0
"""What stands beside a score: unparsed answers, yes-rate, floors without a picture, loyalty."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.eval.task_fixtures import LOCAL, dump_lines, save
from visprune.eval.metrics import (
    Loyalty,
    beside,
    floors,
    loyalty,
    unparsed_rate,
    yes_rate,
)
from visprune.eval.tasks.base import Task, get_task

QUESTIONS = [
    ("what color is the car", "red"),
    ("what color is the bus", "Red."),
    ("what color is the sky", "blue"),
    ("is there a car", "yes"),
    ("is there a bus", "yes"),
    ("is it day", "no"),
]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Six questions on six pictures."""
    rows = [
        {"image": f"{i}.png", "question": question, "answers": answer}
        for i, (question, answer) in enumerate(QUESTIONS)
    ]
    dump_lines(tmp_path / "x.jsonl", rows)
    return get_task("folder", path=str(tmp_path))


def _records(task: Task, *texts: str | None) -> list[Any]:
    found = []
    for sample, text in zip(task.samples(), texts, strict=True):
        parsed = None if text is None else task.parse(text, sample)
        found.append(
            SimpleNamespace(
                sample=sample.id,
                question=sample.question,
                kind=sample.kind,
                cluster=sample.cluster,
                answers=list(sample.answers),
                choices=list(sample.choices),
                meta=dict(sample.meta),
                text=text,
                answer=parsed.answer if parsed else None,
                score=task.score(sample, parsed) if parsed else None,
            )
        )
    return found


def test_unparsed_answers_are_a_share_of_answers(task: Task) -> None:
    records = _records(task, "red", "", "...", "yes", None, "no")
    assert unparsed_rate(records) == pytest.approx(100 * 2 / 5)
    assert math.isnan(unparsed_rate(_records(task, *[None] * 6)))


def test_yes_rate_is_over_yes_no_questions(task: Task) -> None:
    assert yes_rate(_records(task, "yes", "x", "x", "yes", "Yes.", "no")) == pytest.approx(200 / 3)
    assert yes_rate(_records(task, "x", "x", "x", None, None, None)) is None


def test_floors(task: Task) -> None:
    found = floors(task, task.samples())
    assert found is not None
    # "Red." and "red" are one answer; it ties with "yes", two of six each.
    assert found.majority == pytest.approx(100 * 2 / 6)
    assert found.majority_answer in ("red", "yes")
    # Each question is answered from the others: "what color is the" ties, red or blue, for car and
    # bus; "is there a" is right twice; sky and day go wrong.
    assert found.prior == pytest.approx(100 * 3 / 6)
    records = _records(task, *["x"] * 6)
    assert floors(task, records) == found  # from records alone


def test_floors_learned_on_a_train_split(task: Task, tmp_path: Path) -> None:
    rows = [
        {"image": "t.png", "question": "what color is the sky", "answers": "blue"},
        {"image": "t.png", "question": "is it day", "answers": "no"},
        {"image": "t.png", "question": "is it night", "answers": "no"},
    ]
    dump_lines(tmp_path / "train/t.jsonl", rows)
    train = get_task("folder", path=str(tmp_path / "train")).samples()
    found = floors(task, task.samples(), fit=train)
    assert found is not None
    assert (found.majority, found.majority_answer) == (pytest.approx(100 / 6), "no")
    # "what color is the sky" and "is it day" are known word for word.
    assert found.prior == pytest.approx(100 * 2 / 6)


def _asked(*rows: tuple[str, str, str]) -> list[Any]:
    """Samples of (picture, question, answer)."""
    return [
        SimpleNamespace(
            id=str(number), question=question, kind="", cluster=picture, answers=(answer,),
            choices=(), meta={},
        )
        for number, (picture, question, answer) in enumerate(rows)
    ]  # fmt: skip


def test_the_prior_of_balanced_pairs_is_chance() -> None:
    # What VQAv2 and NLVR were made to be: each question of two pictures, once yes and once no.
    rows = [
        (f"{number}{answer}", f"is number {number} in sight", answer)
        for number in range(300)
        for answer in ("yes", "no")
    ]
    found = floors(None, _asked(*rows))
    assert found is not None
    assert found.majority == 50.0
    assert found.prior == pytest.approx(50.0, abs=3.0)
    assert found.prior >= found.majority
    one_less = floors(None, _asked(*rows[:-1]))
    assert one_less is not None
    assert one_less.prior == pytest.approx(50.0, abs=3.0)


def test_a_prior_that_knows_something_is_used() -> None:
    # The first words tell the answer in nine of ten pictures; the rest of a sentence is unique.
    rows = [
        (str(number), f"{('what color', 'how many')[number % 2]} is {number}",
         ("blue" if number % 10 == 0 else ("red", "two")[number % 2]))
        for number in range(200)
    ]  # fmt: skip
    found = floors(None, _asked(*rows))
    assert found is not None
    assert (found.majority, found.prior) == (50.0, 90.0)


def test_floors_do_not_depend_on_the_order_of_questions(task: Task) -> None:
    rows = [(str(n % 7), f"is {n % 5} there", "yes" if n % 3 else "no") for n in range(100)]
    there, back = (floors(None, _asked(*order)) for order in (rows, rows[::-1]))
    assert there == back


def test_ties_count_in_expectation() -> None:
    # Two of four colours are as common: whichever is said, one of two is right.
    rows = [(str(n), "what color", answer) for n, answer in enumerate(["red", "blue"] * 2)]
    found = floors(None, _asked(*rows))
    assert found is not None
    assert found.prior == 50.0
    kinds = _asked(*rows, ("9", "how many", "two"), ("8", "how many", "six"))
    for item in kinds:
        item.kind = item.question
    by_kind = floors(None, kinds)
    assert by_kind is not None
    assert by_kind.per_kind == 50.0


def test_floors_leave_out_what_failed(task: Task) -> None:
    records = _records(task, *["x"] * 6)
    for record in records:
        record.error = None
    for record in records[:2]:  # the two reds
        record.error, record.score, record.text = {"type": "SampleError"}, None, None
    found = floors(task, records)
    assert found is not None
    assert (found.majority_answer, found.majority) == ("yes", 50.0)
    assert floors(task, records[:2]) is None


def test_a_kind_that_is_the_answer_is_no_floor(tmp_path: Path) -> None:
    """The kind of a picture in a folder of classes is its class: who knows it has not to look."""
    for label in ("cat", "dog"):
        for number in range(2):
            save(tmp_path / label / f"{number}.png")
    task = get_task("folder", path=str(tmp_path), metric_name="top1")
    found = floors(task, task.samples())
    assert found is not None
    assert (found.majority, found.per_kind) == (50.0, None)


def test_the_prior_does_not_know_the_questions_it_is_asked() -> None:
    # With the answers of its own pictures it would get every unique question right.
    task = get_task("embedded", limit=300)
    found = floors(task, task.samples())
    assert found is not None
    kinds = {sample.kind for sample in task.samples()}
    assert found.majority < 100 / len(kinds)
    assert 15 < found.prior < 40


@pytest.mark.parametrize(
    ("name", "majority"),
    [
        ("pope", 200 / 3),  # F1 of a constant yes
        ("mme", 2 * 50.0),  # acc 50, acc+ 0, in two categories
        ("vqav2", 100.0),  # every fixture question has the same answers
        ("mmbench_en", 0.0),  # no letter is right in every order
        ("imagenet", 50.0),
    ],
)
def test_floors_are_in_the_task_s_own_unit(tmp_path: Path, name: str, majority: float) -> None:
    LOCAL[name](tmp_path)
    task = get_task(name, data=str(tmp_path))
    found = floors(task, task.samples())
    assert found is not None
    assert found.majority == pytest.approx(majority)


def test_boxes_have_no_floor(tmp_path: Path) -> None:
    LOCAL["refcoco_rec"](tmp_path)
    task = get_task("refcoco_rec", data=str(tmp_path), split="testA")
    assert floors(task, task.samples()) is None


def test_loyalty_counts_agreement_right_or_wrong(task: Task) -> None:
    baseline = _records(task, "red", "green", "", "yes", "x", None)
    run = _records(task, "Red!", "green", "", "no", None, "no")
    # Four are answered by both; the wrong "green" and two silences agree, "no" does not.
    assert loyalty(run, baseline) == 75.0
    assert loyalty(baseline, baseline) == 100.0
    assert math.isnan(loyalty(run, []))
    metric = Loyalty()
    metric.update(["Red!", "green", "no"], ["red", "green", "yes"])
    assert metric.compute()["score"] == pytest.approx(200 / 3)


def test_all_of_it_at_once(task: Task) -> None:
    records = _records(task, "red", "", "blue", "yes", "no", "no")
    found = beside(task, records, records)
    assert found == pytest.approx(
        {
            "unparsed": 100 / 6,
            "yes_rate": 100 / 3,
            "loyalty": 100.0,
            "majority": 100 / 3,
            "per_kind": 100 / 3,
            "prior": 50.0,
        }
    )
    assert "loyalty" not in beside(task, records)
