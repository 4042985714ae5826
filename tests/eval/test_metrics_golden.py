# SPDX-License-Identifier: Apache-2.0
"""Metrics against what the official evaluators return: tests/golden/vqa_accuracy/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visprune.eval.metrics import MME, POPE, VQAAccuracy, vqa_accuracy
from visprune.eval.metrics.vqa_text import NORMALISERS
from visprune.eval.metrics.yesno import parse_yes_no

GOLDEN = Path(__file__).parents[1] / "golden" / "vqa_accuracy"
# Evaluator in the golden file -> our variant.
VQA = {
    "vqa_official": "official",
    "lmms_eval_vqav2": "lmms-eval",
    "lmms_eval_textvqa": "evalai",
    "llava_textvqa": "evalai",
    "vlmevalkit": "vlmevalkit",
}
YES_NO = {
    "pope_official": "llava",
    "llava_eval_pope": "llava",
    "lmms_eval": "lmms-eval",
    "vlmevalkit": "vlmevalkit",
    "mme_lmms_eval": "mme",
}


def _read(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


CASES = _read("cases.json")["cases"]
YES_NO_CASES = _read("yes_no.json")
MME_SETS = _read("mme.json")["sets"]


@pytest.mark.parametrize("evaluator", VQA)
def test_vqa_accuracy_of_every_case(evaluator: str) -> None:
    wrong = {
        case["id"]: case["scores"][evaluator]
        for case in CASES
        if abs(
            vqa_accuracy(case["prediction"], case["answers"], VQA[evaluator])
            - case["scores"][evaluator]
        )
        > 1e-9
    }
    assert len(CASES) > 400
    assert wrong == {}


@pytest.mark.parametrize("evaluator", [name for name in VQA if name != "llava_textvqa"])
def test_normalised_predictions_of_every_case(evaluator: str) -> None:
    normalise = NORMALISERS[VQA[evaluator]]
    assert [normalise(case["prediction"]) for case in CASES] == [
        case["normalised_prediction"][evaluator] for case in CASES
    ]


def test_the_variants_differ_where_they_should() -> None:
    scores = {
        variant: [vqa_accuracy(c["prediction"], c["answers"], variant) for c in CASES]
        for variant in NORMALISERS
    }
    assert len({tuple(values) for values in scores.values()}) == len(NORMALISERS)


@pytest.mark.parametrize("variant", ["official", "evalai", "vlmevalkit"])
def test_the_metric_is_the_mean_of_the_cases(variant: str) -> None:
    metric = VQAAccuracy(variant=variant)
    for case in CASES:
        metric.update([case["prediction"]], [case["answers"]])
    evaluator = next(name for name, ours in VQA.items() if ours == variant)
    mean = sum(case["scores"][evaluator] for case in CASES) / len(CASES)
    assert metric.compute()["score"] == pytest.approx(100 * mean, abs=1e-9)


@pytest.mark.parametrize("evaluator", YES_NO)
def test_yes_no_parsers(evaluator: str) -> None:
    cases = YES_NO_CASES["parser_cases"]
    unknown = "other" if evaluator == "mme_lmms_eval" else "unknown"
    read = [parse_yes_no(case["text"], YES_NO[evaluator])[0] or unknown for case in cases]
    assert len(cases) > 90
    assert read == [case[evaluator] for case in cases]


@pytest.mark.parametrize("golden", YES_NO_CASES["pope_sets"], ids=lambda golden: golden["id"])
@pytest.mark.parametrize("evaluator", ["pope_official", "lmms_eval", "vlmevalkit"])
def test_pope_figures(golden: dict[str, Any], evaluator: str) -> None:
    metric = POPE(parser=YES_NO[evaluator])
    metric.update(golden["texts"], golden["labels"], golden["categories"])
    ours, theirs = metric.compute(), golden["metrics"][evaluator]
    parts = {"": theirs}
    if evaluator == "vlmevalkit":
        parts = {"" if name == "Overall" else f"/{name}": part for name, part in theirs.items()}
    names = {"f1": "f1", "f1_score": "f1", "acc": "accuracy", "accuracy": "accuracy"}
    names |= {"precision": "precision", "recall": "recall"}
    # The official script's yes_ratio counts answers, lmms-eval's counts labels.
    names["yes_ratio"] = "yes_rate" if evaluator == "pope_official" else "label_yes_rate"
    for split, part in parts.items():
        if "error" in part:  # the official script divides by zero; its counts are given
            assert ours["precision"] == 0.0
            continue
        for name in part.keys() & names.keys():
            # Absent: no question of that split; VLMEvalKit then prints 0.
            got = ours.get(f"{names[name]}{split}", 0.0)
            assert got == pytest.approx(100 * part[name], abs=1e-9), (split, name)


@pytest.mark.parametrize("golden", MME_SETS, ids=lambda golden: golden["id"])
def test_mme_points(golden: dict[str, Any]) -> None:
    rows = golden["records"]
    columns = ("prediction", "answer", "category", "question_id")
    given = [[row[column] for row in rows] for column in columns]
    lmms, kit = MME(parser="lmms-eval"), MME(parser="vlmevalkit")
    lmms.update(*given)
    kit.update(*given)
    theirs, ours = golden["lmms_eval"], lmms.compute()
    assert ours["perception"] == pytest.approx(theirs["mme_perception_score"])
    assert ours["cognition"] == pytest.approx(theirs["mme_cognition_score"])
    assert ours["score"] == pytest.approx(ours["perception"] + ours["cognition"])
    for category, points in theirs["per_category"].items():
        assert ours[category] == pytest.approx(points), category
        parts = theirs["acc_and_acc_plus"][category]
        assert ours[f"acc/{category}"] == pytest.approx(parts["acc"])
        assert ours[f"acc_plus/{category}"] == pytest.approx(parts["acc_plus"])
    for category, points in golden["vlmevalkit"].items():
        name = {"reasoning": "cognition"}.get(category, category)
        assert kit.compute()[name] == pytest.approx(points), category


def test_an_unpaired_mme_question_is_counted_not_fatal() -> None:
    assert _read("mme.json")["odd_pair"] == "AssertionError"  # what lmms-eval does
    metric = MME()
    metric.update(["yes", "no", "yes"], ["Yes", "No", "Yes"], ["count"] * 3, ["a", "a", "b"])
    figures = metric.compute()
    assert figures["unpaired"] == 1
    assert (figures["acc/count"], figures["acc_plus/count"]) == (100.0, 100.0)
