# SPDX-License-Identifier: Apache-2.0
"""ANLS, relaxed accuracy and OCRBench against what the official evaluators return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visprune.errors import ConfigError
from visprune.eval.metrics import ANLS, RelaxedAccuracy
from visprune.eval.metrics.reading import (
    anls,
    contains_answer,
    edit_distance,
    relaxed_match,
)
from visprune.eval.tasks.ocrbench import EXPRESSIONS

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = {"lmms_eval": "lmms-eval", "vlmevalkit": "vlmevalkit"}


def _golden(family: str) -> dict[str, Any]:
    found = json.loads((GOLDEN / family / "cases.json").read_text(encoding="utf-8"))
    assert len(found["cases"]) == 120
    return found


@pytest.mark.parametrize("evaluator", VARIANTS)
def test_anls_of_every_case(evaluator: str) -> None:
    metric, total = ANLS(variant=VARIANTS[evaluator]), 0.0
    cases = _golden("anls_docvqa")["cases"]
    for case in cases:
        found = anls(case["prediction"], case["answers"], VARIANTS[evaluator])
        assert found == pytest.approx(case["scores"][evaluator], abs=1e-9), case
        metric.update([case["prediction"]], [case["answers"]])
        total += case["scores"][evaluator]
    assert metric.compute()["score"] == pytest.approx(100 * total / len(cases))


@pytest.mark.parametrize("evaluator", VARIANTS)
def test_relaxed_accuracy_of_every_case(evaluator: str) -> None:
    metric, total = RelaxedAccuracy(variant=VARIANTS[evaluator]), 0.0
    cases = _golden("relaxed_chartqa")["cases"]
    for case in cases:
        found = relaxed_match(case["prediction"], case["answer"], VARIANTS[evaluator])
        assert found == case["scores"][evaluator], case
        metric.update([case["prediction"]], [case["answer"]])
        total += found
    assert metric.compute()["score"] == pytest.approx(100 * total / len(cases))


@pytest.mark.parametrize("evaluator", VARIANTS)
def test_ocrbench_of_every_case(evaluator: str) -> None:
    golden = _golden("ocrbench")
    scores = []
    for case in golden["cases"]:
        scores.append(
            contains_answer(
                case["prediction"], case["answers"], expression=case["category"] == EXPRESSIONS,
                variant=VARIANTS[evaluator],
            )
        )  # fmt: skip
        assert scores[-1] == case["scores"][evaluator], case
    whole, half = golden["sets"]
    if evaluator == "vlmevalkit":
        assert sum(scores) == whole["vlmevalkit"]["Final Score"]
        assert sum(scores[:60]) == half["vlmevalkit"]["Final Score"]
    else:
        assert sum(scores) == 1000 * whole["lmms_eval_final"]
        assert sum(scores[:60]) == 1000 * half["lmms_eval_final"]


def test_variants_are_two_and_named() -> None:
    for check in (
        lambda name: anls("x", ["x"], name),
        lambda name: relaxed_match("x", "x", name),
        lambda name: contains_answer("x", ["x"], variant=name),
        lambda name: ANLS(variant=name),
        lambda name: RelaxedAccuracy(variant=name),
    ):
        with pytest.raises(
            ConfigError, match=r"Did you mean 'lmms-eval'\? Allowed: lmms-eval, vlm"
        ):
            check("lmmseval")


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_edit_distance_is_a_distance(one: str, other: str, third: str) -> None:
    there = edit_distance(one, other)
    assert there == edit_distance(other, one)
    assert (there == 0) == (one == other)
    assert abs(len(one) - len(other)) <= there <= max(len(one), len(other))
    assert there <= edit_distance(one, third) + edit_distance(third, other)


def test_edit_distance_of_known_words() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3


def test_a_long_output_costs_no_time() -> None:
    assert anls("word " * 20_000, ["word", "a longer answer"]) == 0.0
