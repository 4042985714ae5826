# SPDX-License-Identifier: Apache-2.0
"""The report's numbers against numbers worked out by hand, its files, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.eval.made_results import made_results
from visprune.cli import commands as cli
from visprune.errors import ConfigError
from visprune.eval.evaluate import summarize
from visprune.eval.records.folder import ResultsFolder, write_json
from visprune.eval.records.record import Cell, Record
from visprune.eval.report import estimate, write_report
from visprune.eval.report.average import averages
from visprune.eval.report.build import build_tables
from visprune.eval.report.efficiency import FLOP_PARTS
from visprune.eval.report.formats import csv_text, figure, html_json, latex, markdown
from visprune.eval.report.groups import all_averages
from visprune.eval.report.missing import missing_cells
from visprune.eval.report.papers import attach_published
from visprune.eval.report.read import read_results
from visprune.eval.report.rows import Table
from visprune.eval.report.samples import choose, pictures, read_samples
from visprune.eval.report.tables import to_averages_csv, to_csv, to_latex, to_markdown
from visprune.eval.stats import paired_bootstrap, wilson
from visprune.eval.tasks.base import Parsed, Sample, Task, get_task, list_tasks, tasks

HOSTILE = '</script><img src=x onerror="alert(1)">|$&_%{}\\\n=cmd()\u2028\ud800'


def cell(method: str = "none", keep: int | None = None, **changes: Any) -> Cell:
    values: dict[str, Any] = {
        "model": {"name": "m"}, "method": {"method": method}, "task": {"task": "t", "version": 1},
        "prompt_style": "plain", "label": method if keep is None else f"{method} {keep}",
        "num_keep": keep,
    }  # fmt: skip
    if keep is not None:
        values["method"] = {"method": method, "num_keep": keep}
    return Cell(**values | changes)


def record(of: Cell, sample: int, **values: Any) -> Record:
    told = {"answers": ["yes"], "answer": "yes", "text": "yes", "score": 1.0, "cluster": "p"}
    return Record(cell=of.id, sample=f"s{sample}", key="k", **{**told, **values})


def tables(folder: ResultsFolder, **options: Any) -> list[Table]:
    return build_tables(read_results(folder.path), **{"resamples": 400, **options})


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder(tmp_path / "run", create=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ResultsFolder:
    path = tmp_path_factory.mktemp("made") / "results"
    return made_results(path, pictures=30, methods=("random", "todre"), budgets=(128, 32))


def fill(folder: ResultsFolder, of: Cell, records: list[Record]) -> None:
    folder.add_cells([of])
    with folder.writer() as writer:
        writer.write(records)


def test_scores_and_paired_differences_are_those_of_the_plain_bootstrap(
    folder: ResultsFolder,
) -> None:
    random = np.random.default_rng(3)
    whole, pruned = cell(), cell("todre", 64)
    scores = random.random((2, 240)).round(2)
    clusters = [f"p{i // 4}" for i in range(240)]
    for of, values in ((whole, scores[0]), (pruned, scores[1])):
        fill(folder, of, [record(of, i, score=float(v), cluster=clusters[i])
                          for i, v in enumerate(values)])  # fmt: skip
    (table,) = tables(folder, resamples=4000)
    base, row = table.rows
    assert base.score is not None
    assert base.score[0] == pytest.approx(100 * scores[0].mean())
    assert base.delta is None
    wanted = paired_bootstrap(scores[1], scores[0], clusters, resamples=4000)
    assert row.delta is not None
    assert row.delta[0] == pytest.approx(100 * wanted.delta)
    width = 100 * (wanted.high - wanted.low)
    assert row.delta[1] == pytest.approx(100 * wanted.low, abs=0.06 * width)
    assert row.delta[2] == pytest.approx(100 * wanted.high, abs=0.06 * width)
    # Unpaired, the interval would be wider: both models share the luck of a sample.
    assert table.pictures == 60
    assert row.paired == row.n == 240


def test_errors_are_counted_and_left_out_and_scored_zero_beside_it(folder: ResultsFolder) -> None:
    whole, pruned = cell(), cell("todre", 64)
    fill(folder, whole, [record(whole, i, cluster=f"p{i}") for i in range(8)])
    broken = {"score": None, "answer": None, "text": None, "error": {"type": "OSError"}}
    fill(folder, pruned, [
        record(pruned, 0, **broken), record(pruned, 1, **broken),
        record(pruned, 2, answer=None, text="the the", score=0.0),
        *(record(pruned, i, cluster=f"p{i}") for i in range(3, 8)),
    ])  # fmt: skip
    row = tables(folder)[0].rows[1]
    assert row.errors == {"OSError": 2}
    assert row.unparsed == 1
    assert row.score is not None
    assert row.score[0] == pytest.approx(100 * 5 / 6)
    assert row.score_errors_wrong == pytest.approx(100 * 5 / 8)
    assert row.paired == 6
    assert row.agreement == pytest.approx(5 / 6)


def test_yes_rate_agreement_and_the_commonest_answer(folder: ResultsFolder) -> None:
    whole, pruned = cell(), cell("todre", 64)
    right = ["yes", "no", "no", "no", "red"]
    for of, said in ((whole, right), (pruned, ["yes", "yes", "Yes", "no", "red"])):
        fill(folder, of, [
            record(of, i, answers=[right[i]], answer=a, text=a, score=float(a == right[i]),
                   kind="color" if right[i] == "red" else "exist", cluster=f"p{i}")
            for i, a in enumerate(said)
        ])  # fmt: skip
    (table,) = tables(folder)
    base, row = table.rows
    assert (base.yes_rate, row.yes_rate) == (0.25, 0.75)  # "Yes" and "yes" are one
    assert row.yes_wanted == 0.25
    assert row.agreement == 0.6
    # "no" for all (3 of 5); "no" for exist (3 of 4) and "red" for color.
    assert table.floors is not None
    assert table.floors.majority_answer == "no"
    assert table.floors.majority == pytest.approx(60.0)
    assert table.floors.per_kind == pytest.approx(80.0)
    assert any("Few pictures (5)" in note for note in table.notes)


def test_floors_stand_in_every_table(folder: ResultsFolder) -> None:
    whole, colors = cell(), ("red", "red", "red", "blue")
    fill(folder, whole, [
        *(record(whole, i, question="what color is it", answers=[color], kind="color",
                 cluster=f"p{i}") for i, color in enumerate(colors)),
        *(record(whole, 4 + i, question="how many are there", answers=["2"], kind="count",
                 cluster=f"p{i}") for i in range(3)),
    ])  # fmt: skip
    found = tables(folder)
    # Red for the colours (one is wrong, and to one of the red the others tie with nothing), 2 else.
    floors = {"commonest answer": 42.9, "commonest answer of each kind": 85.7,
              "text-only prior": 85.7}  # fmt: skip
    for text in (to_markdown(found, {}), to_latex(found, {})):
        for name, value in floors.items():
            assert f"{name}: {value}" in text
        assert "Text-only prior: a question gets the commonest answer" in text
    (line,) = csv.DictReader(io.StringIO(to_csv(found)))
    values = [float(line[f"floor_{name}"]) for name in ("majority", "per_kind", "prior")]
    assert values == pytest.approx([*floors.values()], abs=0.05)


def test_floors_of_pooled_seeds_are_those_of_all_their_questions(folder: ResultsFolder) -> None:
    for seed, right in ((0, ["a", "a", "b", "c"]), (1, ["d"] * 8)):
        of = dataclasses.replace(cell(task={"task": "t", "version": 1, "seed": seed}), seed=seed)
        fill(folder, of, [record(of, i, answers=[answer], cluster=f"{seed} {i}")
                          for i, answer in enumerate(right)])  # fmt: skip
    (table,) = tables(folder)
    assert table.floors is not None
    assert table.floors.majority == pytest.approx(100 * (2 + 8) / 12)
    assert table.floors.majority_answer == "a / d"


def test_loyalty_and_unparsed_need_no_references(folder: ResultsFolder) -> None:
    """Answers of a test split that is not public have no score, and agree all the same."""
    whole, pruned = cell(), cell("todre", 64)
    broken = {"answer": None, "text": None, "error": {"type": "OSError"}}
    for of, said in ((whole, ["A cat.", "dog", "bird", "cow"]), (pruned, ["cat", "dog", "fish"])):
        fill(folder, of, [
            *(record(of, i, answers=[], answer=a, text=a, score=None, cluster=f"p{i}")
              for i, a in enumerate(said)),
            *([record(of, 3, answers=[], score=None, **broken)] if of is pruned else []),
            record(of, 4, answers=[], answer=None, text="?", score=None),
        ])  # fmt: skip
    (table,) = tables(folder)
    row = table.rows[1]
    # Two of three words, and the same thing that no rule could read; the error is no answer.
    assert row.agreement == pytest.approx(3 / 4)
    assert (row.score, row.delta, row.paired, table.floors) == (None, None, 0, None)
    text = to_markdown([table], {})
    assert "25.0" in text  # one of four answers is unparsed: errors are no answers
    assert "Text-only prior" not in text


def test_all_right_has_wilsons_interval_not_a_point(folder: ResultsFolder) -> None:
    whole = cell()
    fill(folder, whole, [record(whole, i, cluster=f"p{i}") for i in range(40)])
    score = tables(folder)[0].rows[0].score
    assert score is not None
    assert score[1] == pytest.approx(100 * wilson(40, 40)[0])
    assert score[2] == 100.0


def test_seeds_of_an_arm_are_one_row(folder: ResultsFolder) -> None:
    whole = cell()
    fill(folder, whole, [record(whole, i, cluster=f"p{i}") for i in range(10)])
    for seed, right in ((0, 4), (1, 8)):
        method = {"method": "random", "num_keep": 8, "seed": seed}
        of = dataclasses.replace(cell("random", 8, control=True), seed=seed, method=method)
        fill(folder, of, [record(of, i, score=float(i < right), cluster=f"p{i}")
                          for i in range(10)])  # fmt: skip
    base, row = tables(folder)[0].rows
    assert row.seeds == [0, 1]
    assert row.n == 20
    assert row.score is not None
    assert row.score[0] == pytest.approx(60.0)
    assert row.delta is not None
    assert row.delta[0] == pytest.approx(-40.0)
    assert row.spread == pytest.approx(np.std([40, 80], ddof=1))
    assert row.arm.control
    assert not base.arm.control


def test_an_arm_is_paired_with_the_untouched_run_of_its_seed(folder: ResultsFolder) -> None:
    for seed, right in ((0, 9), (1, 5)):
        for method in ("none", "todre"):
            of = dataclasses.replace(cell(method), seed=seed)
            fill(folder, of, [record(of, i, score=float(i < right), cluster=f"p{i}")
                              for i in range(10)])  # fmt: skip
    base, row = tables(folder)[0].rows
    assert base.seeds == row.seeds == [0, 1]
    assert row.delta == (0.0, 0.0, 0.0)
    assert row.agreement == 1.0


def test_numbers_are_never_minus_zero() -> None:
    assert figure((-0.001, -0.04, 0.04), sign=True) == "+0.0 [+0.0, +0.0]"
    assert figure((-1.26, float("nan"), 0.0)) == "-1.3"
    assert figure(None) == ""


def test_cost_is_two_flops_per_multiply_add_by_part(made: ResultsFolder) -> None:
    table = tables(made)[0]
    whole = table.rows[0].cost
    assert whole.flops["prefill"] == 2 * 2_500_000 * (576 + 20)
    assert whole.total_flops == sum(whole.flops.values())
    assert whole.time("total_ms") == pytest.approx((71.2, 71.2 * 0.97, 71.2 * 1.05))
    assert whole.time("prefill_ms", "4") is not None
    assert whole.kv_bytes == 8192 * 576
    todre = next(row for row in table.rows if row.arm.label == "todre 32")
    assert todre.cost.tokens == 32
    assert "flops" in todre.pareto
    random = next(row for row in table.rows if row.arm.label == "random 128")
    assert "flops" not in random.pareto  # todre costs the same and scores more
    assert [row.arm.method for row in table.rows] == ["none", "random", "random", "todre", "todre"]


def test_a_model_without_the_picture_is_a_floor_and_on_no_front(folder: ResultsFolder) -> None:
    for method, right, prefill in (("none", 9, 100), ("no_image", 4, 10), ("todre", 8, 50)):
        of = cell(method, control=method == "no_image")
        fill(folder, of, [record(of, i, score=float(i < right), cluster=f"p{i}",
                                 macs={"prefill": prefill}) for i in range(10)])  # fmt: skip
    found = tables(folder)
    front = {row.arm.method for row in found[0].rows if "flops" in row.pareto}
    assert front == {"none", "todre"}
    assert "without the picture: 40.0" in to_markdown(found, {})


def test_kinds_are_means_with_paired_differences(made: ResultsFolder) -> None:
    table = tables(made)[0]
    row = next(row for row in table.rows if row.arm.label == "todre 32")
    lines = list(row.outcomes[0].lines.values())
    base = table.rows[0].outcomes[0].lines
    for kind, found in row.kinds.items():
        mine = [line for line in lines if line.kind == kind]
        scores = [line.score for line in mine if line.score is not None]
        assert found["n"] == len(mine)
        assert found["score"][0] == pytest.approx(100 * np.mean(scores))
        both = [
            line.score - other
            for line in mine
            if line.score is not None and (other := base[line.sample].score) is not None
        ]
        assert found["delta"][0] == pytest.approx(100 * np.mean(both))
        assert found["delta"][1] <= found["delta"][0] <= found["delta"][2]


@dataclass(frozen=True, kw_only=True)
class Plus(Task):
    """A score that is no mean: the share of pictures with all questions right (MME's acc+)."""

    name: ClassVar[str] = "plus"

    def parse(self, text: str, sample: Sample) -> Parsed:
        return Parsed(text, "whole")

    def score(self, sample: Sample, parsed: Parsed) -> float:
        return float(parsed.answer in sample.answers)

    def aggregate(
        self, records: Any, *, errors_count_as_wrong: bool = False
    ) -> dict[str, float]:  # fmt: skip
        right: dict[str, list[float]] = {}
        for line in records:
            right.setdefault(line.cluster, []).append(line.score or 0.0)
        pairs = [len(scores) == 2 and min(scores) == 1.0 for scores in right.values()]
        return {"score": 100.0 * float(np.mean(pairs)), "pairs": float(len(pairs))}


def test_a_score_that_is_no_mean_is_computed_anew_on_every_draw(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "get_task", lambda name, **options: Plus(**options))
    random = np.random.default_rng(0)
    whole, pruned = (cell(n, k, task=Plus().to_dict()) for n, k in (("none", None), ("todre", 8)))
    scores = (random.random((2, 120)) < [[0.9], [0.7]]).astype(float)
    for of, values in ((whole, scores[0]), (pruned, scores[1])):
        fill(folder, of, [record(of, i, score=v, cluster=f"p{i // 2}")
                          for i, v in enumerate(values)])  # fmt: skip
    first, pairs = scores.reshape(2, 60, 2).min(2)
    ends = paired_bootstrap(pairs, first, list(range(60)))
    (table,) = tables(folder)
    row = table.rows[1]
    assert not table.mean
    assert row.score is not None
    assert row.score[0] == pytest.approx(100 * pairs.mean())
    assert row.figures["pairs"] == 60  # a picture drawn twice is two pictures, not one of four
    assert row.delta is not None
    assert row.delta[0] == pytest.approx(100 * ends.delta)
    assert row.delta[1] == pytest.approx(100 * ends.low, abs=6)
    assert row.delta[2] == pytest.approx(100 * ends.high, abs=6)


def _said(name: str, i: int, right: bool) -> dict[str, Any]:
    """A record of a real task: references, meta, and an answer that is right or not."""
    cluster = f"p{i // 2}"
    if name == "refcoco_rec":
        box = "0.1,0.1,0.5,0.5" if right else "0.6,0.6,0.9,0.9"
        return {"answers": [], "answer": box, "meta": {"box": [0.1, 0.1, 0.5, 0.5]},
                "score": float(right), "cluster": cluster}  # fmt: skip
    if name == "imagenet":
        text = "7 1 2 3 4" if right else "1 7 2 3 4"
        return {"answers": ["7"], "answer": text[0], "text": text, "score": float(right),
                "cluster": cluster}  # fmt: skip
    answers = {"vqav2": ["yes"] * 10, "mmbench_en": ["A"]}.get(name, ["yes" if i % 2 else "no"])
    wrong = {"mmbench_en": "B"}.get(name, "no" if answers[0] == "yes" else "yes")
    answer = answers[0] if right else wrong
    kind = {"pope": ("random", "adversarial")[i // 2 % 2], "mme": "existence"}.get(name, "k")
    return {"answers": answers, "answer": answer, "text": answer, "score": float(right),
            "kind": kind, "cluster": cluster}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mean"),
    [("vqav2", True), ("imagenet", True), ("refcoco_rec", True), ("embedded", True),
     ("pope", False), ("mme", False), ("mmbench_en", False)],
)  # fmt: skip
def test_the_scores_of_real_tasks_are_their_own(
    folder: ResultsFolder, name: str, mean: bool
) -> None:
    task = get_task(name)
    whole, pruned = (cell(m, k, task=task.to_dict()) for m, k in (("none", None), ("todre", 8)))
    for of, shift in ((whole, 1), (pruned, 0)):
        told = [_said(name, i, (i + shift) % 3 != 0) for i in range(60)]
        named = [dataclasses.replace(record(of, i, **t), sample=str(i)) for i, t in enumerate(told)]
        fill(folder, of, named)
    (table,) = tables(folder)
    assert table.notes == []
    assert table.mean is mean
    for row, of in zip(table.rows, (whole, pruned), strict=True):
        wanted = task.aggregate(folder.records(of.id))
        assert row.score is not None
        assert row.score[0] == pytest.approx(wanted["score"])
        assert row.score[1] < row.score[0] < row.score[2]
        assert row.figures == pytest.approx(wanted)
    assert table.floors is not None or name == "refcoco_rec"
    assert table.unit == ("points" if name == "mme" else "%")


def test_a_bad_mme_is_in_points_too_and_its_seeds_are_not_mixed(folder: ResultsFolder) -> None:
    """With two seeds in one, every picture has four questions and none has all of them right."""
    right = {"none": (20, 12), "todre": (6, 10)}
    scores: dict[str, list[float]] = {}
    for seed in (0, 1):
        task = dataclasses.replace(get_task("mme"), seed=seed)
        for method, many in right.items():
            of = dataclasses.replace(cell(method, task=task.to_dict()), seed=seed)
            told = [_said("mme", i, i < many[seed]) for i in range(60)]
            fill(folder, of, [dataclasses.replace(record(of, i, **t), sample=str(i))
                              for i, t in enumerate(told)])  # fmt: skip
            figures = task.aggregate(folder.records(of.id))
            scores.setdefault(method, []).append(figures["score"])
    (table,) = tables(folder)
    base, row = table.rows
    assert table.unit == "points"
    assert base.score is not None
    assert row.delta is not None
    assert base.score[0] == pytest.approx(np.mean(scores["none"]))
    assert base.score[0] < 100
    assert row.delta[0] == pytest.approx(np.mean(scores["todre"]) - np.mean(scores["none"]))
    assert row.delta[1] < row.delta[0] < row.delta[2]


def test_one_picture_has_no_interval(folder: ResultsFolder) -> None:
    whole, pruned = cell(), cell("todre", 64)
    for of, right in ((whole, 6), (pruned, 3)):
        fill(folder, of, [record(of, i, score=float(i < right), kind=f"k{i % 2}")
                          for i in range(8)])  # fmt: skip
    (table,) = tables(folder)
    assert table.notes[-1] == "One picture: there is no interval."
    text = to_markdown([table], {})
    assert "| 37.5 | -37.5 |" in text
    assert "nan" not in text.lower()
    for kind in table.rows[1].kinds.values():
        assert np.isnan(kind["delta"][1:]).all()


def test_an_empty_task_and_nothing_but_errors_are_no_scores(folder: ResultsFolder) -> None:
    whole, pruned = cell(), cell("todre", 64)
    fill(folder, whole, [record(whole, i, cluster=f"p{i}") for i in range(4)])
    broken = {"score": None, "answer": None, "text": None, "error": {"type": "OSError"}}
    fill(folder, pruned, [record(pruned, i, cluster=f"p{i}", **broken) for i in range(4)])
    folder.add_cells([cell("fastv", 8)])
    results = read_results(folder.path)
    (table,) = build_tables(results, resamples=400)
    row = table.rows[1]
    assert (row.score, row.delta, row.agreement, row.paired) == (None, None, None, 0)
    assert row.score_errors_wrong == 0.0
    assert row.errors == {"OSError": 4}
    assert [empty.label for empty in results.empty] == ["fastv 8"]
    assert "nan" not in to_markdown([table], {}).lower()
    assert averages([table, table]) == []


def test_batches_of_half_precision_are_tables_of_their_own(folder: ResultsFolder) -> None:
    """They may answer otherwise: neither is paired with the other, and titles name them."""
    for size, score in ((2, 0.0), (8, 1.0)):
        for method in ("none", "todre"):
            of = cell(method, generation={"do_sample": False, "batch_size": size})
            fill(folder, of, [record(of, i, score=score, cluster=f"p{i}") for i in range(4)])
    found = {table.task: table for table in tables(folder)}
    assert sorted(found) == ["t generation.batch_size=2", "t generation.batch_size=8"]
    for table in found.values():
        delta = table.rows[1].delta
        assert delta is not None
        assert delta[0] == 0.0


def test_namesakes_are_told_apart_by_their_files_alone(folder: ResultsFolder) -> None:
    for path, metric in (("a.jsonl", "gqa"), ("b.jsonl", "exact_match"), ("c.jsonl", "gqa")):
        of = cell(task={"task": "folder", "version": 1, "path": path, "metric_name": metric})
        fill(folder, of, [record(of, 0)])
    titles = sorted(table.task for table in tables(folder))
    assert titles == ["folder path=a.jsonl", "folder path=b.jsonl", "folder path=c.jsonl"]


def test_a_title_says_what_is_not_usual_where_the_data_lies_it_does_not(
    folder: ResultsFolder,
) -> None:
    """With OCR tokens TextVQA is another benchmark, also where the folder holds no other."""
    task = get_task("textvqa", ocr=True, data="here", limit=5, seed=3)
    of = cell(task=task.to_dict())
    fill(folder, of, [record(of, 0)])
    (table,) = tables(folder)
    assert table.task == "textvqa ocr=True"
    for text in (to_markdown([table], {}), to_latex([table], {}), to_csv([table])):
        assert "textvqa ocr=True" in text


def test_time_is_that_of_the_batches_that_were_measured(tmp_path: Path) -> None:
    made = made_results(tmp_path / "results", pictures=4, methods=("todre",), budgets=(32,))
    both = tables(made)[0]
    assert "| total ms |" in to_markdown([both], {})
    assert "total ms, batch 4" in to_markdown([both], {})
    assert "prefill ms, batch 4" not in to_markdown([both], {})
    for file in (made.path / "speed").glob("*.json"):
        found = json.loads(file.read_text())
        del found["batch"]["1"]
        file.write_text(json.dumps({**found, "peak_bytes": 3 * 2**20}))
    only = tables(ResultsFolder(made.path))[0]
    text = to_markdown([only], {})
    assert "| total ms, batch 4 |" in text
    assert "| prefill ms, batch 4 |" in text
    assert "| total ms |" not in text
    assert "| peak GPU MiB |" in text
    row = next(row for row in only.rows if row.arm.label == "todre 32")
    assert row.cost.on("total_ms") == pytest.approx(3.1 * (28.0 + 0.075 * 32))
    assert any("total_ms" in row.pareto for row in only.rows)
    assert row.cost.peak_bytes == 3 * 2**20


def test_a_task_on_which_nothing_is_right_leaves_no_average(folder: ResultsFolder) -> None:
    for name, score in (("t", 1.0), ("u", 0.0)):
        for method in ("none", "todre"):
            of = cell(method, task={"task": name, "version": 1})
            fill(folder, of, [record(of, i, score=score, cluster=f"p{i}") for i in range(4)])
    assert averages(tables(folder)) == []


def test_the_average_over_tasks_is_relative_to_the_untouched_model(made: ResultsFolder) -> None:
    found = tables(made)
    rows = {row["arm"].label: row for row in averages(found)}
    assert rows["untouched"]["score"][0] == 100
    shares = []
    for table in found:
        base, row = table.rows[0], next(r for r in table.rows if r.arm.label == "todre 32")
        assert base.score is not None
        assert row.delta is not None
        shares.append(100 * (base.score[0] + row.delta[0]) / base.score[0])
    assert rows["todre 32"]["score"][0] == pytest.approx(np.mean(shares))
    assert averages(found[:1]) == []


def test_a_run_that_is_not_finished_says_so(folder: ResultsFolder) -> None:
    whole, pruned = cell(), cell("todre", 64)
    fill(folder, whole, [record(whole, i, cluster=f"p{i}") for i in range(40)])
    fill(folder, pruned, [record(pruned, i, cluster=f"p{i}") for i in range(11)])
    refused = cell("fastv", 8, refused="the model shows no attention")
    folder.add_cells([refused])
    (table,) = tables(folder)
    assert "Incomplete, fewer than 40 samples: todre 64 (11)." in table.notes
    assert table.rows[1].paired == 11
    assert [c.refused for c in read_results(folder.path).empty] == ["the model shows no attention"]


def test_answers_of_several_versions_are_a_remark(folder: ResultsFolder) -> None:
    old, new = (
        folder.add_environment({"versions": {"torch": "2.14.1", "transformers": version}})
        for version in ("5.23.0", "5.24.0")
    )
    plain, other = cell(), cell("todre", 4)
    folder.add_cells([plain, other])
    with folder.writer() as writer:
        writer.write([record(plain, i, cluster=str(i), env=old) for i in range(40)])
        writer.write([record(other, i, cluster=str(i), env=old) for i in range(40)])
    assert not any("versions" in note for note in tables(folder)[0].notes)
    with folder.writer() as writer:
        writer.write([record(other, 40, cluster="40", env=new)])
        writer.write([record(plain, 40, cluster="40", env=new)])
    (note,) = (note for note in tables(folder)[0].notes if "versions" in note)
    assert "(transformers 5.23.0, 5.24.0)" in note


def test_repeats_collapse_as_in_the_records(folder: ResultsFolder) -> None:
    whole = cell()
    failed = {"score": None, "answer": None, "error": {"type": "OSError", "message": "x"}}
    fill(folder, whole, [record(whole, 0, **failed), record(whole, 0, score=0.5),
                         record(whole, 0, score=0.0)])  # fmt: skip
    with folder.record_files()[0].open("ab") as file:
        file.write(b'{"v": 1, "cell": "')  # torn
    (run,) = read_results(folder.path).outcomes
    assert [line.score for line in run.lines.values()] == [0.5]
    (kept,) = folder.records()
    assert kept.score == 0.5


def test_published_numbers_stand_beside_measured_ones(made: ResultsFolder) -> None:
    found = tables(made)
    study = {"published": {"source": "Paper, table 1", "note": "their prompts", "rows": [
        {"label": "todre 32", "task": "embedded", "score": 88.1, "metric": "score"},
        {"label": "none", "task": "embedded", "model": "owner/made-7b", "score": 93.0},
        {"label": "todre 32", "task": "gqa", "score": 59.4},
        {"label": "todre 32", "task": "embedded", "model": "another-13b", "score": 1.0},
    ]}}  # fmt: skip
    published = attach_published(study, found)
    assert [entry["matched"] for entry in published] == [True, True, False, False]
    beside = {row.arm.label: [p["score"] for p in row.published] for row in found[0].rows}
    assert beside["todre 32"] == [88.1]
    assert beside["untouched"] == [93.0]
    assert published[0]["note"] == "their prompts"
    assert "88.1" in to_markdown(found, {})
    assert attach_published({}, found) == attach_published({"published": "?"}, found) == []


def test_a_published_number_stands_beside_no_other_budget_or_metric(tmp_path: Path) -> None:
    """25 % is not 25 tokens, 2.5 % not 25 %, and a figure of another metric not the score."""
    folder = made_results(tmp_path, pictures=3, methods=["todre"], budgets=[25], speed=False)
    labels = ("todre 25", "todre 25 %", "todre 2.5", "TODRE-25")
    rows = [{"label": label, "task": "embedded", "score": 50.0 + i}
            for i, label in enumerate(labels)]  # fmt: skip
    rows.append({"label": "todre 25", "task": "embedded", "score": 1.0, "metric": "f1"})
    found = tables(folder)
    published = attach_published({"published": {"source": "Paper", "rows": rows}}, found)
    assert [entry["matched"] for entry in published] == [True, False, False, True, False]
    (row,) = [row for row in found[0].rows if row.arm.label == "todre 25"]
    assert [p["score"] for p in row.published] == [50.0, 53.0]


def test_one_picture_leaves_cells_of_the_csv_empty(tmp_path: Path) -> None:
    """There is no interval of a difference: an empty cell, not the text nan."""
    folder = made_results(tmp_path, pictures=1, methods=["todre"], budgets=[32], speed=False)
    text = to_csv(tables(folder))
    _, line, *_ = csv.DictReader(io.StringIO(text))
    assert line["delta"] != ""
    assert (line["delta_low"], line["delta_high"]) == ("", "")
    assert "nan" not in text


def test_everything_a_table_must_carry_is_in_every_format(made: ResultsFolder) -> None:
    found = tables(made)
    row = next(row for row in found[0].rows if row.arm.label == "todre 32")
    assert row.score is not None
    assert row.delta is not None
    score = f"{row.score[0]:.1f} [{row.score[1]:.1f}, {row.score[2]:.1f}]"
    delta = f"{row.delta[0]:+.1f} [{row.delta[1]:+.1f}, {row.delta[2]:+.1f}]"
    texts = (to_markdown(found, {}), to_latex(found, {}))
    for text in texts:
        assert score in text
        assert delta in text
        for name in (*FLOP_PARTS, "agreement", "KV", "unparsed", "errors", "(control)",
                     "commonest answer", "total ms"):  # fmt: skip
            assert name.replace("_", r"\_") in text
    assert r"\toprule" in texts[1]
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    mine = next(r for r in rows if r["label"] == "todre 32" and r["task"] == "embedded")
    assert float(mine["delta_low"]) == row.delta[1]
    assert float(mine["macs_prefill"]) * 2 == float(mine["flops_prefill"])
    assert mine["batch4_total_ms"]
    assert next(r for r in rows if r["label"] == "random 32")["control"] == "True"


@pytest.mark.parametrize("escape", [markdown, latex, csv_text])
def test_hostile_text_stays_text(escape: Any) -> None:
    text = escape(HOSTILE)
    assert "\n" not in text
    assert "\u2028" not in text
    if escape is markdown:
        assert not re.search(r"(?<!\\)[|<>`]", text)
    if escape is latex:
        # Whatever TeX reads as a command is one of the replacements.
        assert not re.search(r"(?<!\\)[$&%#_]", text)
        assert "\\textbackslash{}" in text
    assert csv_text("=cmd()") == "'=cmd()"
    assert csv_text("todre 64") == "todre 64"


def test_json_cannot_leave_its_script() -> None:
    text = html_json({HOSTILE: [HOSTILE, float("nan"), float("inf"), 1.5]})
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == {HOSTILE: [HOSTILE, None, None, 1.5]}


def test_samples_are_chosen_alike_every_time_and_say_what_is_left_out(made: ResultsFolder) -> None:
    results = read_results(made.path)
    outcomes = [run for run in results.outcomes if run.cell.task["task"] == "embedded"]
    total = len(outcomes[0].lines)
    some = choose("embedded", outcomes, 30)
    assert some == choose("embedded", list(reversed(outcomes)), 30)
    assert len(some.names) == 30
    assert some.of == total
    assert some.failed == 5
    assert some.disagree == 15
    everything = choose("embedded", outcomes, 10_000)
    assert len(everything.names) == total
    assert (everything.failed, everything.disagree) == (0, 0)
    assert choose("embedded", outcomes, 0).names == []
    got = read_samples(results, [some], {run.cell.id: i for i, run in enumerate(outcomes)})
    assert [sample["id"] for sample in got] == list(some.names)
    assert all(len(sample["got"]) == len(outcomes) for sample in got)
    uris = pictures(results, got)
    assert {sample["picture"] for sample in got} == set(uris)
    assert all(uri.startswith("data:image/jpeg;base64,/9j/") for uri in uris.values())


def test_no_picture_outside_the_folder_is_read(folder: ResultsFolder) -> None:
    whole = cell()
    (folder.path.parent / "secret.jpg").write_bytes(b"secret")
    (folder.path / "pictures" / "abc.jpg").write_bytes(b"no picture")
    (folder.path / "pictures" / "evil.jpg").write_bytes(b"no picture")
    names = ["../../secret", "abc", "evil", 7, None]
    fill(folder, whole, [record(whole, i, picture=name) for i, name in enumerate(names)])
    results = read_results(folder.path)
    chosen = choose("t", results.outcomes, 10)
    samples = read_samples(results, [chosen], {whole.id: 0})
    assert [sample["picture"] for sample in samples] == [None, "abc", None, None, None]
    assert pictures(results, samples) == {}


def test_the_page_keeps_to_its_size(made: ResultsFolder, tmp_path: Path) -> None:
    whole = write_report(made.path, tmp_path / "a", samples=60, resamples=100)["page"]
    none = write_report(made.path, tmp_path / "b", samples=0, resamples=100)["page"]
    assert none.stat().st_size < 250_000 < whole.stat().st_size < 10_000_000


def test_the_command_writes_all_files(
    made: ResultsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["visprune", "report", str(made.path), "--out", str(tmp_path / "r"), "--samples", "4"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    names = {
        "report.html", "tables.md", "tables.csv", "kinds.csv", "averages.csv", "tables.tex",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "r").iterdir()} == names
    assert {Path(line).name for line in capsys.readouterr().out.split()} == names
    text = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    # Nothing can be fetched: no address at all but the name of the SVG name space.
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


@pytest.mark.parametrize("break_it", ["empty", "nothing", "stranger", "damaged", "out", "options"])
def test_what_cannot_be_reported_is_said(folder: ResultsFolder, break_it: str) -> None:
    whole = cell()
    if break_it != "empty":
        fill(folder, whole, [record(whole, 0)])
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "empty": ("no records yet", {}),
        "nothing": ("not there", {"results": folder.path / "x"}),
        "stranger": ("another run", {}),
        "damaged": ("is no record", {}),
        "out": ("Cannot write", {"out": folder.path / "study.json"}),
        "options": ("resamples >= 100", {"resamples": 3}),
    }
    if break_it == "stranger":
        stranger = cell("fastv", 3)
        with folder.writer() as writer:
            writer.write([record(stranger, 0)])
    if break_it == "damaged":
        with folder.record_files()[0].open("ab") as file:
            file.write(b"garbage\n")
    write_json(folder.path / "study.json", {})
    message, options = cases[break_it]
    with pytest.raises(ConfigError, match=message):
        write_report(**{"results": folder.path, **options})


def test_every_format_says_which_cells_have_no_records(folder: ResultsFolder) -> None:
    whole, later = cell(), [cell("todre", 8, seed=seed) for seed in (0, 7)]
    refused = cell("fastv", 8, refused="The model shows no attention.")
    fill(folder, whole, [record(whole, i, cluster=f"p{i}") for i in range(4)])
    folder.add_cells([*later, refused])
    written = write_report(folder.path, folder.path / "report", samples=0, resamples=100)
    texts = {kind: path.read_text(encoding="utf-8") for kind, path in written.items()}
    said = ("todre 8 on m, t, seed 0, 7: no records yet", "fastv 8 on m, t: The model shows no att")
    for kind in ("markdown", "latex"):
        assert texts[kind].count("Not in the tables") == 1
        assert all(text in texts[kind] for text in said), kind
    names = ("label", "n", "seeds", "missing")
    rows = [[row[name] for name in names] for row in csv.DictReader(io.StringIO(texts["csv"]))]
    assert rows[0] == ["untouched", "4", "0", ""]
    assert sorted(rows[1:]) == [
        ["fastv 8", "0", "0", "The model shows no attention."],
        ["todre 8", "0", "0 7", "no records yet"],
    ]
    assert "no records yet" in texts["page"]
    assert all(text in summarize(folder)[1] for text in said)
    fill(folder, refused, [record(refused, 0)])
    assert [gone.label for gone in missing_cells(read_results(folder.path).empty)] == ["todre 8"]


def test_reading_and_grounding_have_an_average_of_their_own(folder: ResultsFolder) -> None:
    """Pruning halves what is read and leaves the rest: the average over all hides it."""
    kept = {"textvqa": 0.5, "chartqa": 0.5, "gqa": 1.0, "pope": 1.0}
    for name, share in kept.items():
        for method, score in (("none", 1.0), ("todre", share)):
            of = cell(method, task={"task": name, "version": 0})  # of no version: the plain mean
            fill(folder, of, [record(of, i, score=score, cluster=f"p{i}") for i in range(4)])
    found = all_averages(tables(folder))
    group = "reading and grounding"
    assert list(found) == [("m", ""), ("m", group)]
    scores = {name: {r["arm"].label: r["score"][0] for r in rows} for name, rows in found.items()}
    assert scores["m", ""]["todre"] == pytest.approx(75.0)
    assert scores["m", group]["todre"] == pytest.approx(50.0)
    text = to_markdown(tables(folder), found)
    assert "## m, reading and grounding: mean over tasks, % of the untouched model" in text
    paper = to_latex(tables(folder), found)
    assert paper.count(r"\begin{table}") == 2 + len(kept)
    said = paper.partition(r"\caption{m, reading and grounding: mean over tasks")[2]
    row = next(line for line in said.splitlines() if line.startswith("todre"))
    assert row.split(" & ")[1].startswith("50.0")
    lines = {
        (line["group"], line["label"]): line
        for line in csv.DictReader(to_averages_csv(found).splitlines())
    }
    assert float(lines["", "todre"]["score"]) == pytest.approx(75.0)
    assert float(lines[group, "todre"]["delta"]) == pytest.approx(-50.0)
    reading = [name for name in list_tasks() if tasks.get(name).GROUP]
    assert reading == ["textvqa", "ocrbench", "docvqa", "infovqa", "chartqa", "refcoco_rec",
                       "topology"]  # fmt: skip
    # Of nothing but such tasks it would be the average over all, said twice.
    alone = [table for table in tables(folder) if table.task in ("textvqa", "chartqa")]
    assert list(all_averages(alone)) == [("m", "")]
    page = write_report(folder.path, resamples=100)["page"].read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [entry["group"] for entry in data["averages"]] == ["", group]
