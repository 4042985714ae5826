# SPDX-License-Identifier: Apache-2.0
"""Letters, boxes, GQA and yes/no against what their scorers return: tests/golden/*/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visprune.eval.metrics import LetterMatch
from visprune.eval.metrics.boxes import RECAccuracy, parse_box
from visprune.eval.metrics.letters import LETTER_PARSERS, parse_letter
from visprune.eval.metrics.text import gqa_match
from visprune.eval.metrics.yesno import parse_yes_no

GOLDEN = Path(__file__).parents[1] / "golden"
# Golden family -> our parser.
LETTERS = {
    "letters_scienceqa_llava": "scienceqa-llava",
    "letters_scienceqa_lmms": "scienceqa-lmms-eval",
    "letters_seed_llava": "seed-llava",
    "letters_seed_lmms": "seed-lmms-eval",
    "letters_mmbench_vlmevalkit": "vlmevalkit",
}
YES_NO = {
    "pope_llava": "llava",
    "pope_lmms_eval": "lmms-eval",
    "vlmevalkit": "vlmevalkit",
    "mme_lmms_eval": "mme",
}


def _cases(family: str, count: int) -> list[dict[str, Any]]:
    cases = json.loads((GOLDEN / family / "cases.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == count
    return cases


@pytest.mark.parametrize("family", LETTERS)
def test_letters_score_as_published(family: str) -> None:
    wrong = {}
    for case in _cases(family, 250):
        metric = LetterMatch(parser=LETTERS[family])
        metric.update([case["output"]], [(case["answer"], case["choices"])])
        if metric.compute()["score"] != 100 * case["score"]:
            wrong[case["id"]] = (case["output"], case["choices"], case["answer"], case["score"])
    assert wrong == {}


@pytest.mark.parametrize(
    "family", ["letters_scienceqa_llava", "letters_seed_lmms", "letters_mmbench_vlmevalkit"]
)
def test_letters_are_read_as_published(family: str) -> None:
    parser = LETTERS[family]
    for case in _cases(family, 250):
        letter, _ = parse_letter(case["output"], case["choices"], parser)
        theirs = case["parsed"]
        if family == "letters_seed_lmms":
            assert (letter or "").lower() == theirs.lower(), case
        else:
            assert letter == (None if theirs == "FAILED" else theirs), case


def test_no_two_rules_of_letters_are_one() -> None:
    cases = [case for family in LETTERS for case in _cases(family, 250)]
    read = {
        parser: tuple(parse_letter(case["output"], case["choices"], parser) for case in cases)
        for parser in LETTER_PARSERS
    }
    assert len(set(read.values())) == len(LETTER_PARSERS)


def test_boxes_are_read_and_scored_as_lmms_eval_does() -> None:
    names = {f"ACC@{t}": f"acc@{t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9)}
    names |= {"IoU": "iou", "Center_ACC": "center"}
    for case in _cases("boxes_refcoco_lmms", 200):
        box, _ = parse_box(case["output"], parser="lmms-eval")
        assert (box or (0.0,) * 4) == pytest.approx(case["parsed"], abs=1e-9), case
        metric = RECAccuracy(parser="lmms-eval")
        metric.update([case["output"]], [case["box"]])
        ours = metric.compute()
        for theirs, name in names.items():
            value = case["scores"][theirs]
            # Where the union is empty, theirs divides by it and the run ends; ours is wrong.
            expected = 0.0 if value == "ZeroDivisionError" else value
            assert ours[name] == pytest.approx(100 * expected, abs=1e-7), (case, theirs)


def test_gqa_as_lmms_eval_scores_it() -> None:
    wrong = {
        case["id"]: case
        for case in _cases("gqa_lmms", 100)
        if gqa_match(case["prediction"], case["answer"], "lmms-eval") != case["score"]
    }
    assert wrong == {}


@pytest.mark.parametrize("evaluator", YES_NO)
def test_yes_no_of_every_text(evaluator: str) -> None:
    unknown = "other" if evaluator == "mme_lmms_eval" else "unknown"
    wrong = {}
    for case in _cases("yesno", 200):
        read = parse_yes_no(case["output"], YES_NO[evaluator])[0] or unknown
        theirs = case.get("labels", case)[evaluator]
        if read != theirs:
            wrong[case["output"]] = (read, theirs)
    assert wrong == {}
