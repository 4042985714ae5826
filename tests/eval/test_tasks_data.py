# SPDX-License-Identifier: Apache-2.0
"""Published benchmarks, read from their usual files and from a copy of the Hub's repository."""

from __future__ import annotations

import copy
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from tests.eval.hub_fixtures import HUB, write_hub
from tests.eval.task_fixtures import LOCAL, drawn, dump, dump_lines, save
from visprune.errors import ConfigError, VispruneError
from visprune.eval.tasks.base import Parsed, Sample, SampleError, Task, get_task, list_tasks
from visprune.eval.tasks.loading import decode

OPTIONS: dict[str, dict[str, Any]] = {
    "textvqa": {"ocr": True},
    "refcoco_rec": {"split": "testA"},
}
DATA_TASKS = [name for name in list_tasks() if name not in ("embedded", "folder", "topology")]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folder of every task, ``("files", task)`` and ``("hub", task)``."""
    made = {}
    for name in DATA_TASKS:
        for form in ("files", "hub"):
            root = tmp_path_factory.mktemp(f"{form}_{name}")
            LOCAL[name](root) if form == "files" else write_hub(name, root)
            made[form, name] = root
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what ``datasets`` caches away from the user's folder."""
    folder = tmp_path_factory.getbasetemp() / "datasets_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def _task(name: str, root: Path | None, **more: Any) -> Task:
    data = {} if root is None else {"data": str(root)}
    return get_task(name, **data, **{**OPTIONS.get(name, {}), **more})


def test_every_data_task_has_fixtures() -> None:
    assert set(DATA_TASKS) == set(LOCAL) == set(HUB)


@pytest.mark.parametrize("form", ["files", "hub"])
@pytest.mark.parametrize("name", DATA_TASKS)
def test_samples(roots: dict[tuple[str, str], Path], name: str, form: str) -> None:
    task = _task(name, roots[form, name])
    samples = task.samples()
    assert len(samples) > 0
    assert [sample.id for sample in samples] == [samples[i].id for i in range(len(samples))]
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.image().size == (12, 8)
        assert sample.image().mode == "RGB"
        assert sample.cluster
        assert json.loads(json.dumps(sample.meta)) == sample.meta
        assert task.generates == bool(sample.question)


@pytest.mark.parametrize("name", [n for n in DATA_TASKS if n not in ("refcoco_rec", "imagenet")])
def test_files_and_hub_say_the_same(roots: dict[tuple[str, str], Path], name: str) -> None:
    first, second = (_task(name, roots[form, name]) for form in ("files", "hub"))
    pairs = list(zip(first.samples(), second.samples(), strict=True))
    for one, other in pairs:
        assert first.prompt(one) == second.prompt(other)
        assert one.answers == other.answers
        assert one.choices == other.choices
        if name != "scienceqa_img":  # the Hub's ScienceQA has no ids
            assert one.id == other.id
        if name not in ("scienceqa_img", "chartqa"):  # nor has its ChartQA names of charts
            assert one.cluster == other.cluster
        if name != "mmbench_en":  # the fixtures differ in the category alone
            assert one.kind == other.kind


def test_questions_about_one_chart_are_one_cluster(roots: dict[tuple[str, str], Path]) -> None:
    files, hub = (_task("chartqa", roots[form, "chartqa"]).samples() for form in ("files", "hub"))
    assert [sample.cluster for sample in files] == ["1.png", "1.png", "2.png"]
    assert len({sample.cluster for sample in hub}) == 1  # the fixture has one picture
    assert {sample.kind for sample in hub} == {"human_test", "augmented_test"}


def test_ocrbench_counts_what_papers_count(roots: dict[tuple[str, str], Path]) -> None:
    task = _task("ocrbench", roots["files", "ocrbench"])
    texts = ["It says centre.", r"\FRAC{1}{2}", "1200"]
    figures = task.aggregate(
        [_record(task, s, t) for s, t in zip(task.samples(), texts, strict=True)]
    )
    assert figures["final"] == 2.0  # the formula's case counts, "1200" holds "12"
    assert figures["score"] == pytest.approx(200 / 3)
    assert figures["score/Text Recognition"] == 100.0
    expression = task.samples()[1]
    assert task.score(expression, task.parse(r"$ \frac{1} {2} $", expression)) == 1.0


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_splits_whose_answers_a_server_keeps_have_no_score(tmp_path: Path, name: str) -> None:
    LOCAL[name](tmp_path)
    for file in tmp_path.glob("*val_v1.0_withQT.json"):
        told = json.loads(file.read_text())
        for row in told["data"]:
            del row["answers"]
        file.with_name(file.name.replace("val_v1.0_withQT", "test_v1.0")).write_text(
            json.dumps(told)
        )
    task = _task(name, tmp_path, split="test")
    samples = task.samples()
    assert task.scored is False
    assert all(sample.answers == () for sample in samples)
    assert task.aggregate([_record(task, samples[0], "x")]) == {}


def test_half_of_chartqa_is_not_chartqa(tmp_path: Path) -> None:
    LOCAL["chartqa"](tmp_path)
    (tmp_path / "test_human.json").unlink()
    with pytest.raises(ConfigError, match=r"has one of test_human\.json and test_augmented\.json"):
        _task("chartqa", tmp_path).samples()


@pytest.mark.parametrize("name", DATA_TASKS)
def test_the_right_answer_scores_full(roots: dict[tuple[str, str], Path], name: str) -> None:
    task = _task(name, roots["files", name])
    samples = task.samples()
    if name == "refcoco_rec":
        texts = ["[0.25, 0.25, 0.75, 0.75]"] * len(samples)
    else:
        texts = [max(set(s.answers), key=s.answers.count) for s in samples]
    metric = task.metric()
    metric.update(texts, samples)
    best = 200.0 * 2 if name == "mme" else 100.0  # two categories of 200 points
    assert metric.compute()["score"] == pytest.approx(best)
    assert all(task.score(s, task.parse(t, s)) == 1.0 for s, t in zip(samples, texts, strict=True))
    metric.reset()
    metric.update(["?"] * len(samples), samples)
    # POPE's own parser takes silence for yes: F1 66.7.
    assert metric.compute()["score"] < (67 if name == "pope" else 1)


_OUTPUTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "\n", "yes", "No.", "B", "(c) x", "[1,2,3,4]", "[9,9,1,1]", "1 2 3", "٣"]),
    st.lists(st.integers(-(10**400), 10**400), min_size=4, max_size=4).map(str),
)


@pytest.mark.parametrize("name", DATA_TASKS)
def test_any_output_gets_a_score(roots: dict[tuple[str, str], Path], name: str) -> None:
    task = _task(name, roots["files", name])
    samples = list(task.samples())

    @hypothesis.given(text=_OUTPUTS)
    def check(text: str) -> None:
        for sample in samples:
            parsed = task.parse(text, sample)
            assert (parsed.answer is None) == (parsed.rule == "")
            assert 0.0 <= task.score(sample, parsed) <= 1.0
        figures = task.aggregate([_record(task, sample, text) for sample in samples])
        assert all(np.isfinite(value) for value in figures.values())

    check()


def test_a_data_set_saved_to_disk_is_read(tmp_path: Path) -> None:
    write_hub("pope", tmp_path / "hub")
    data = datasets.load_dataset(str(tmp_path / "hub"))
    data.save_to_disk(tmp_path / "disk")
    assert len(_task("pope", tmp_path / "disk").samples()) == 6
    data["test"].save_to_disk(tmp_path / "split")
    assert len(_task("pope", tmp_path / "split", split="popular").samples()) == 2


@pytest.mark.parametrize("form", ["files", "hub"])
def test_pope_takes_one_split(roots: dict[tuple[str, str], Path], form: str) -> None:
    samples = _task("pope", roots[form, "pope"], split="adversarial").samples()
    assert [sample.id for sample in samples] == ["adversarial/1", "adversarial/2"]


def test_a_limit_does_not_tear_pairs_apart(roots: dict[tuple[str, str], Path]) -> None:
    for limit in (2, 3):
        samples = _task("mme", roots["hub", "mme"], limit=limit).samples()
        assert [sample.id for sample in samples] == ["count/0001.jpg", "count/0001.jpg#2"]
    drawn = {
        _task("mme", roots["hub", "mme"], limit=2, seed=seed).samples()[0].cluster
        for seed in range(1, 20)
    }
    assert len(drawn) == 4
    with pytest.raises(ConfigError, match="limit=1 is less than the 2 samples"):
        _task("mme", roots["hub", "mme"], limit=1).samples()


def test_mme_takes_one_part(roots: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"No row .* belongs to mme"):
        _task("mme", roots["files", "mme"], part="cognition").samples()
    assert len(_task("mme", roots["files", "mme"], part="perception").samples()) == 8


def test_mmbench_counts_a_question_only_if_all_shifts_are_right(
    roots: dict[tuple[str, str], Path],
) -> None:
    task = _task("mmbench_en", roots["files", "mmbench_en"])
    single = _task("mmbench_en", roots["files", "mmbench_en"], circular=False)
    assert [sample.id for sample in single.samples()] == ["241", "252"]
    answers = dict(zip(("241", "1000241", "252", "1000252"), "BABB", strict=True))
    records = [_record(task, sample, answers[sample.id]) for sample in task.samples()]
    figures = task.aggregate(records)
    # 241 is right twice; 252 is right in its second order alone.
    assert figures == {"score": 50.0, "per_question": 75.0, "vanilla": 50.0}
    again = [_record(task, sample, answers[sample.id]) for sample in task.samples()[:2]]
    for record in again:  # as a bootstrap that drew the first picture twice
        record.sample, record.cluster = f"{record.sample}#1", f"{record.cluster}#1"
    figures = task.aggregate([*records, *again])
    assert (figures["score"], figures["vanilla"]) == pytest.approx((200 / 3, 200 / 3))


def test_refcoco_has_a_sample_for_each_expression(roots: dict[tuple[str, str], Path]) -> None:
    samples = _task("refcoco_rec", roots["hub", "refcoco_rec"]).samples()
    assert [sample.question for sample in samples] == ["left man", "guy on the left"]
    assert [sample.id for sample in samples] == ["1", "1#2"]
    local = _task("refcoco_rec", roots["files", "refcoco_rec"]).samples()
    # The Hub has corner, width and height; Qwen's file two corners.
    assert samples[0].meta["box"] == local[0].meta["box"] == [0.25, 0.25, 0.75, 0.75]


def test_imagenet_numbers_classes_by_synset(roots: dict[tuple[str, str], Path]) -> None:
    task = _task("imagenet", roots["files", "imagenet"])
    assert [sample.answers for sample in task.samples()] == [("0",), ("1",)]
    records = [_record(task, sample, "5 1 3 2 4") for sample in task.samples()]
    assert task.aggregate(records) == {"score": 0.0, "top1": 0.0, "top5": 50.0}


def test_imagenet_refuses_a_mixture_of_synsets_and_other_folders(tmp_path: Path) -> None:
    save(tmp_path / "n01440764/a.jpg")
    save(tmp_path / "cat/a.jpg")
    with pytest.raises(ConfigError, match="others are not: cat"):
        _task("imagenet", tmp_path).samples()


@pytest.mark.parametrize("form", ["files", "hub"])
def test_refcoco_in_pixels_of_the_picture_that_the_model_saw(tmp_path: Path, form: str) -> None:
    box = [500.0, 300.0, 1500.0, 900.0]
    if form == "files":
        row = {"image": "a.png", "sent": "dog", "bbox": box, "width": 2000, "height": 1500}
        dump_lines(tmp_path / "refcoco_testA.jsonl", [row])
    else:
        _refcoco_hub(tmp_path, [Image.new("RGB", (2000, 1500))], [500.0, 300.0, 1000.0, 600.0])
    limits = {"min_pixels": 200704, "max_pixels": 1003520}
    task = _task("refcoco_rec", tmp_path, scale="pixels", **limits)
    (sample,) = task.samples()
    # Qwen2.5-VL sees 1148 x 840 of 2000 x 1500 under these limits.
    right = str([round(v * f) for v, f in zip(box, (0.574, 0.56, 0.574, 0.56), strict=True)])
    assert task.score(sample, task.parse(right, sample)) == 1.0
    assert task.score(sample, task.parse(str(box), sample)) == 0.0
    metric = task.metric()
    metric.update([right], [sample])
    assert metric.compute()["acc@0.9"] == 100.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "pixels"}, "needs .* min_pixels and max_pixels .*got min_pixels=None, max"),
        ({"scale": "pixels", "min_pixels": 9, "max_pixels": 4}, "got min_pixels=9, max_pixels=4"),
        ({"scale": "pixels", "min_pixels": 9}, "got min_pixels=9, max_pixels=None"),
        ({"frame": "square"}, "no frame 'square'.*Allowed: seen, picture"),
        ({"max_pixels": 9}, "with scale='pixels' alone, got min_pixels=None, max_pixels=9"),
    ],
)
def test_refcoco_refuses_pixels_of_unknown_size(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_task("refcoco_rec", **options)


def test_refcoco_s_other_scales_are_what_they_were() -> None:
    before = {"task": "refcoco_rec", "version": 1, "limit": None, "seed": 0, "split": "val"}
    before |= {"data": None, "dataset": "refcoco", "scale": "per_mille", "orient": True}
    assert get_task("refcoco_rec", scale="per_mille").to_dict() == before
    limits = {"min_pixels": 3136, "max_pixels": 12845056}
    now = get_task("refcoco_rec", scale="pixels", **limits).to_dict()
    assert now == before | limits | {"scale": "pixels", "version": 2}
    other = get_task("refcoco_rec", scale="per_mille", frame="picture").to_dict()
    assert other == before | {"frame": "picture"}
    assert get_task("refcoco_rec").to_dict()["frame"] == "seen"


def test_refcoco_s_sizes_are_read_once_and_nothing_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [Image.new("RGB", (12, 8)), Image.new("RGB", (24, 8))]
    _refcoco_hub(tmp_path, pictures, [3.0, 2.0, 6.0, 4.0])
    samples = _task("refcoco_rec", tmp_path).samples()
    opened = []
    whole = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kw: opened.append(1) or whole(*args, **kw))

    def load(*args: Any) -> None:
        raise AssertionError("a picture was decoded")

    with monkeypatch.context() as patched:
        patched.setattr("PIL.ImageFile.ImageFile.load", load)
        for _ in range(3):  # the cells of a study
            assert [sample.meta["size"] for sample in samples] == [[12, 8], [24, 8]]
    assert len(opened) == 2
    assert samples[1].image().size == (24, 8)


def _refcoco_hub(root: Path, pictures: list[Image.Image], box: list[float]) -> None:
    """One object with one expression on each picture."""
    rows = [
        {"question_id": str(i), "answer": ["dog"], "bbox": box, "file_name": f"{i}.jpg"}
        for i in range(len(pictures))
    ]
    _save_table(root, rows, pictures)


def _save_table(
    root: Path, rows: list[dict[str, Any]], pictures: list[Image.Image] | None = None
) -> None:
    """Write a split as ``save_to_disk`` does, with these pictures or a red one in each row."""
    data = datasets.Dataset.from_list(rows)
    column = []
    for picture in pictures if pictures is not None else [drawn("red")] * len(rows):
        file = io.BytesIO()
        picture.save(file, "PNG")
        column.append({"bytes": file.getvalue(), "path": None})
    if column:
        data = data.add_column("image", column, feature=datasets.Image())
    data.save_to_disk(root)


def test_options_stand_in_what_a_record_says_of_its_task() -> None:
    # The titles of tables are made of these.
    assert get_task("textvqa", ocr=True).to_dict()["ocr"] is True
    assert get_task("mme", part="perception").to_dict()["part"] == "perception"


def test_textvqa_without_tokens_does_not_read_them(roots: dict[tuple[str, str], Path]) -> None:
    task = _task("textvqa", roots["files", "textvqa"], ocr=False)
    assert "Reference OCR" not in task.prompt(task.samples()[0])
    assert task.to_dict()["ocr"] is False  # the row of the results says which


class _Record:
    """What aggregate reads."""

    def __init__(self, task: Task, sample: Any, text: str) -> None:
        parsed = task.parse(text, sample)
        self.sample, self.kind, self.cluster = sample.id, sample.kind, sample.cluster
        self.answers, self.answer, self.meta = sample.answers, parsed.answer, sample.meta
        self.text: str | None = text
        self.score: float | None = task.score(sample, parsed)


def _record(task: Task, sample: Any, text: str) -> Any:
    return _Record(task, sample, text)


@pytest.mark.parametrize("name", ["pope", "mme", "mmbench_en", "vizwiz"])
def test_records_and_metric_agree(roots: dict[tuple[str, str], Path], name: str) -> None:
    task = _task(name, roots["files", name])
    samples = list(task.samples())
    texts = ["yes" if i % 3 else "A" for i in range(len(samples))]
    records = [_record(task, sample, text) for sample, text in zip(samples, texts, strict=True)]
    metric = task.metric()
    metric.update(texts, samples)
    figures = task.aggregate(records)
    score = figures["per_question" if name == "mmbench_en" else "score"]
    assert metric.compute()["score"] == pytest.approx(score)


@pytest.mark.parametrize("name", ["pope", "mme", "vqav2", "mmbench_en", "refcoco_rec", "imagenet"])
def test_errors_are_left_out_or_count_as_wrong(
    roots: dict[tuple[str, str], Path], name: str
) -> None:
    task = _task(name, roots["files", name])
    texts = {"refcoco_rec": "[0.25,0.25,0.75,0.75]", "imagenet": "0", "mmbench_en": "B"}
    records = [_record(task, sample, texts.get(name, "red")) for sample in task.samples()]
    broken = _record(task, task.samples()[0], "")
    broken.text = broken.answer = broken.score = None
    with_error = [broken, *records[1:]]
    skipped = task.aggregate(with_error)
    assert skipped == task.aggregate(records[1:]) or name == "mmbench_en"
    counted = task.aggregate(with_error, errors_count_as_wrong=True)
    assert counted["score"] <= task.aggregate(records)["score"]
    assert task.aggregate([broken]) == {}


# What goes wrong, and what the user reads.


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_an_unread_answer_is_wrong_whatever_the_label(name: str) -> None:
    sample = Sample("1", "?", lambda: Image.new("RGB", (1, 1)), ("True",))
    assert get_task(name).score(sample, Parsed(None)) == 0.0


@pytest.mark.parametrize("name", ["pope", "mme"])
@pytest.mark.parametrize("label", ["True", "", None])
def test_labels_other_than_yes_and_no_are_refused(tmp_path: Path, name: str, label: Any) -> None:
    LOCAL[name](tmp_path / "files")
    if name == "pope":
        told = tmp_path / "files/coco/coco_pope_popular.json"
        row = json.loads(told.read_text().splitlines()[1])
        dump_lines(told, [row | {"label": "no"}, row | {"label": label}])
        where = r"coco_pope_popular\.json, line 2: "
    else:
        told = tmp_path / "files/MME_Benchmark_release_version/count/0002.txt"
        told.write_text(f"Is it?\tyes\n\na?\t{'' if label is None else label}\n", encoding="utf-8")
        where = r"0002\.txt, line 3: the right answer is yes or no, got"
    with pytest.raises(ConfigError, match=where):
        _task(name, tmp_path / "files").samples()
    rows = copy.deepcopy(HUB[name]["default"]["test"])
    rows[3]["answer"] = label
    _save_table(tmp_path / "hub", rows)
    with pytest.raises(ConfigError, match=r"hub, row 3: (the right answer|answer is a text)"):
        _task(name, tmp_path / "hub").samples()


def test_three_questions_about_one_picture_of_mme_are_refused(tmp_path: Path) -> None:
    LOCAL["mme"](tmp_path)
    told = tmp_path / "MME_Benchmark_release_version/count/0002.txt"
    told.write_text(told.read_text() + "Is it?\tYes\n")
    with pytest.raises(ConfigError, match=r"0002\.txt, line 1: MME asks two .*3 about count/0002"):
        _task("mme", tmp_path).samples()


def test_mmbench_without_shifts_is_not_called_circular(tmp_path: Path) -> None:
    LOCAL["mmbench_en"](tmp_path)
    told = tmp_path / "mmbench_dev_20230712.tsv"
    told.write_bytes(told.read_bytes().replace(b"\n1000", b"\n"))
    with pytest.raises(ConfigError, match=r"holds no circular shift .*set circular=False"):
        _task("mmbench_en", tmp_path).samples()
    task = _task("mmbench_en", tmp_path, circular=False)
    assert (task.metric_name, len(task.samples())) == ("letter_match", 4)


def test_mmbench_v11_is_another_benchmark(tmp_path: Path) -> None:
    LOCAL["mmbench_en"](tmp_path)
    told = tmp_path / "mmbench_dev_20230712.tsv"
    told.rename(tmp_path / "MMBench_DEV_EN_V11.tsv")
    with pytest.raises(ConfigError, match=r"does not hold the data.*\(not V11\)"):
        _task("mmbench_en", tmp_path).samples()
    shutil.copy(tmp_path / "MMBench_DEV_EN_V11.tsv", tmp_path / "MMBench_DEV_EN.tsv")
    assert len(_task("mmbench_en", tmp_path).samples()) == 4


def _without(*path: Any) -> Callable[[Any], Any]:
    """Take one value out of a JSON value."""
    return lambda value: _changed(value, path, _GONE)


def _with(*path: Any, new: Any) -> Callable[[Any], Any]:
    """Put another value into a JSON value."""
    return lambda value: _changed(value, path, new)


_GONE: Any = object()


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is _GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_ANSWERS = "v2_mscoco_val2014_annotations.json"
_TEXTVQA = "TextVQA_0.5.1_val.json"
_GQA = "data/testdev_balanced_questions.json"
DAMAGE: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("scienceqa_img", "pid_splits.json", _without("test"), "no list of .*'test'; it has: train"),
    ("scienceqa_img", "pid_splits.json", lambda _: ["11"], "is a list, not an object"),
    ("scienceqa_img", "problems.json", _without("16"), "names the problem '16', which"),
    ("scienceqa_img", "problems.json", _without("21", "hint"), "problem 21 has no column 'hint'"),
    ("scienceqa_img", "problems.json", _with("21", "answer", new=2), "from 0 to 1, got 2"),
    ("scienceqa_img", "problems.json", _with("21", "choices", new="ab"), "list of up to 5 texts"),
    ("textvqa", _TEXTVQA, _without("data"), "no list 'data': it is an object of dataset_type"),
    ("textvqa", _TEXTVQA, lambda value: value["data"], "is a list, not an object"),
    ("textvqa", _TEXTVQA, _without("data", 1, "image_id"), "row 1 has no column 'image_id'"),
    ("textvqa", _TEXTVQA, _with("data", 1, "answers", new=[]), "row 1: answers is a list of what"),
    ("gqa", _GQA, lambda value: [*value.values()], "is a list, not an object"),
    ("gqa", _GQA, _without("201640614", "imageId"), "question 201640614 has no column 'imageId'"),
    ("gqa", _GQA, _with("201640614", "question", new=7), "201640614: question is a text, got 7"),
    ("seedbench_image", "SEED-Bench.json", _without("questions"), "no list 'questions'"),
    ("seedbench_image", "SEED-Bench.json", _without("questions", 0, "data_id"), "'data_id'"),
    ("vqav2", _QUESTIONS, lambda value: value["questions"], "is a list, not an object"),
    ("vqav2", _ANSWERS, lambda value: value["annotations"], "is a list, not an object"),
    ("vqav2", _ANSWERS, _without("annotations", 2, "question_id"), "row 2 has no col.*question_id"),
    ("vqav2", _ANSWERS, _without("annotations", 2), "row 2 is question 73000, which .*not answer"),
    ("vqav2", _QUESTIONS, _with("questions", 1, "image_id", new="x"), "row 1: COCO numbers"),
    ("vizwiz", "val.json", lambda value: {"data": value}, "holds no list: it is an object of data"),
    ("vizwiz", "val.json", _with(1, new="a.jpg"), 'row 1 is the value "a.jpg", not an object'),
    ("vizwiz", "val.json", _with(1, "question", new=None), "row 1: question is null"),
]


@pytest.mark.parametrize(("name", "file", "damage", "message"), DAMAGE)
def test_a_damaged_file_is_named_with_its_row(
    tmp_path: Path, name: str, file: str, damage: Callable[[Any], Any], message: str
) -> None:
    LOCAL[name](tmp_path)
    dump(tmp_path / file, damage(json.loads((tmp_path / file).read_text())))
    with pytest.raises(ConfigError, match=message) as refused:
        _task(name, tmp_path).samples()
    assert str(tmp_path) in str(refused.value)


def test_mme_texts_are_utf_8_with_a_tab(tmp_path: Path) -> None:
    LOCAL["mme"](tmp_path)
    told = tmp_path / "MME_Benchmark_release_version/count/0001.txt"
    told.write_bytes("Is it größer?\tYes\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"Cannot read .*0001\.txt: 'utf-8' codec"):
        _task("mme", tmp_path).samples()
    told.write_text("Is it?\tYes\nIs it? No\n")
    with pytest.raises(ConfigError, match=r"0001\.txt, line 2: a tab stands between"):
        _task("mme", tmp_path).samples()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"", b"", r"Cannot read .*mmbench_dev_20230712\.tsv"),
        (b"\n1000252", b"\nlast", r"tsv, row 3: index is a whole number, got 'last'"),
        (b"\t241\ts\tl\t\tdev\r\n", b"\r\n", r"tsv, row 1: image is empty"),
        (b"\thint\t", b"\thnt\t", r"no column 'hint'\. Did you mean 'hnt'"),
    ],
)
def test_a_damaged_table_of_mmbench_is_named_with_its_row(
    tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    LOCAL["mmbench_en"](tmp_path)
    told = tmp_path / "mmbench_dev_20230712.tsv"
    told.write_bytes(told.read_bytes().replace(old, new) if old else b"")
    with pytest.raises(ConfigError, match=message):
        _task("mmbench_en", tmp_path).samples()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("width", 0, "line 1: width is at least 1 pixel, got 0"),
        ("height", "8", "line 1: height is at least 1 pixel, got '8'"),
        ("bbox", [1, 2, 3], "line 1: bbox: A box is four numbers"),
        ("sent", None, "line 1: sent is null"),
    ],
)
def test_a_row_of_refcoco_that_cannot_be_scored(
    tmp_path: Path, column: str, value: Any, message: str
) -> None:
    LOCAL["refcoco_rec"](tmp_path)
    told = tmp_path / "refcoco_testA.jsonl"
    dump_lines(told, [json.loads(told.read_text()) | {column: value}])
    with pytest.raises(ConfigError, match=rf"refcoco_testA\.jsonl, {message}"):
        _task("refcoco_rec", tmp_path).samples()


def _damaged(value: Any) -> Iterator[Any]:
    """A JSON value with one part gone, or another in its place; of lists the last item's parts."""
    for path in [(), *_paths(value)]:
        for new in (None, 7, []):
            yield _changed(value, path, new)
        if path:
            yield _changed(value, path, _GONE)


def _paths(value: Any) -> Iterator[tuple[Any, ...]]:
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        keys = [len(value) - 1]
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in _paths(value[key]))


@pytest.mark.parametrize("name", [n for n in DATA_TASKS if n not in ("imagenet", "mme")])
def test_no_damage_of_a_file_is_more_than_an_error_in_one_sentence(
    tmp_path: Path, name: str
) -> None:
    LOCAL[name](tmp_path)
    for file in (*tmp_path.glob("*.json*"), *tmp_path.glob("*/*.json"), *tmp_path.glob("*.tsv")):
        raw = file.read_bytes()
        forms = [raw[: len(raw) // 2], raw + b"\xff"]
        if file.suffix == ".jsonl" or name == "pope":
            *lines, last = raw.splitlines()
            damaged = [json.dumps(value).encode() for value in _damaged(json.loads(last))]
            forms += [b"\n".join([*lines, line]) for line in damaged]
        elif file.suffix == ".json":
            forms += [json.dumps(value).encode() for value in _damaged(json.loads(raw))]
        for form in forms:
            file.write_bytes(form)
            try:
                task = _task(name, tmp_path)
                for sample in task.samples():
                    task.prompt(sample)
                    assert task.score(sample, task.parse("Yes", sample)) <= 1.0
            except VispruneError:
                pass  # any other error fails the test
        file.write_bytes(raw)


def test_a_table_with_null_for_a_question_is_named_with_its_row(tmp_path: Path) -> None:
    rows = copy.deepcopy(HUB["vizwiz"]["default"]["val"])
    rows[1]["question"] = None
    _save_table(tmp_path, rows)
    with pytest.raises(ConfigError, match="row 1: question is a text, got None"):
        _task("vizwiz", tmp_path).samples()


def test_a_table_without_pictures_is_refused(tmp_path: Path) -> None:
    _save_table(tmp_path, HUB["vizwiz"]["default"]["val"], pictures=[])
    with pytest.raises(ConfigError, match="has no column 'image'"):
        _task("vizwiz", tmp_path).samples()


def test_textvqa_s_table_without_tokens_is_refused(tmp_path: Path) -> None:
    rows = [
        {k: v for k, v in row.items() if k != "ocr_tokens"}
        for row in HUB["textvqa"]["default"]["validation"]
    ]
    _save_table(tmp_path, rows)
    with pytest.raises(ConfigError, match="has no column 'ocr_tokens'"):
        _task("textvqa", tmp_path, ocr=True).samples()
    assert len(_task("textvqa", tmp_path, ocr=False).samples()) == 2


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown task 'vqa2'\. Did you mean 'vqav2'\?"):
        get_task("vqa2")


def test_an_unknown_split_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no split 'rando'.*'random'.*all, random, popular"):
        get_task("pope", split="rando")


@pytest.mark.parametrize(
    ("task", "option"),
    [("pope", "parser"), ("vqav2", "variant"), ("mme", "part"), ("refcoco_rec", "scale")],
)
def test_an_unknown_value_lists_those_there_are(task: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"no {option} 'x'.*Allowed: "):
        get_task(task, **{option: "x"})


def test_without_a_network_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*hf download.*data=DIR"):
        get_task("pope").samples()


@pytest.mark.parametrize("name", DATA_TASKS)
def test_an_empty_folder_says_what_should_be_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"neither a \.jsonl|does not hold the data.*data is a"):
        _task(name, tmp_path).samples()


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        _task("gqa", tmp_path / "nowhere").samples()


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "image": "a.jpg", "txt": "Is it?", "label": "yes"}]
    dump_lines(tmp_path / "coco_pope_random.json", rows)
    with pytest.raises(ConfigError, match=r"line 1 has no column 'text'. Did you mean 'txt'"):
        _task("pope", tmp_path, split="random").samples()


def test_wrong_columns_of_a_hub_copy_are_named(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"question_id": "1", "question": "Is it?"}])
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="no column 'answer', 'category'"):
        _task("pope", tmp_path).samples()


def test_a_split_that_the_data_does_not_have(tmp_path: Path) -> None:
    write_hub("scienceqa_img", tmp_path)
    with pytest.raises(ConfigError, match="validation"):
        _task("scienceqa_img", tmp_path, split="val").samples()


def test_a_missing_pope_file_is_named(tmp_path: Path) -> None:
    LOCAL["pope"](tmp_path)
    (tmp_path / "coco/coco_pope_popular.json").unlink()
    with pytest.raises(ConfigError, match=r"no coco_pope_popular\.json"):
        _task("pope", tmp_path).samples()
    assert len(_task("pope", tmp_path, split="random").samples()) == 2


def test_questions_without_answers_are_refused(tmp_path: Path) -> None:
    LOCAL["vqav2"](tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(ConfigError, match="without their answers"):
        _task("vqav2", tmp_path).samples()


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text('[{"image": "a')
    with pytest.raises(ConfigError, match=r"Cannot read .*val\.json"):
        _task("vizwiz", tmp_path).samples()


@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_a_picture_that_cannot_be_read_names_its_file(tmp_path: Path, damage: str) -> None:
    LOCAL["gqa"](tmp_path)
    picture = tmp_path / "data/images/n161313.jpg"
    whole = picture.read_bytes()
    picture.unlink()
    if damage != "missing":
        picture.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    samples = _task("gqa", tmp_path).samples()  # the questions can be listed
    with pytest.raises(SampleError, match=r"n161313\.jpg"):
        samples[0].image()


def test_a_damaged_picture_of_the_hub_names_its_row(tmp_path: Path) -> None:
    write_hub("vizwiz", tmp_path)
    file = tmp_path / "default/val-00000-of-00001.parquet"
    data = datasets.Dataset.from_parquet(str(file)).remove_columns("image")
    rotten = [{"bytes": b"no picture", "path": None}] * len(data)
    data.add_column("image", rotten, feature=datasets.Image()).to_parquet(file)
    with pytest.raises(SampleError, match="row 1"):
        _task("vizwiz", tmp_path).samples()[1].image()


def test_gqa_without_a_picture_says_which(tmp_path: Path) -> None:
    dump(tmp_path / "testdev_balanced_questions.json", {})
    with pytest.raises(ConfigError, match="has no rows"):
        _task("gqa", tmp_path).samples()


@pytest.mark.parametrize("form", ["BMP", "TIFF", "GIF"])
def test_a_damaged_size_is_an_error_of_that_picture_alone(form: str) -> None:
    """One wrong byte claims gigabytes; Pillow's refusal of that is of no common class."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form)
    raw = bytearray(file.getvalue())
    if form == "BMP":
        raw[18:26] = struct.pack("<ii", 60_000, 60_000)
    elif form == "GIF":
        raw[6:10] = struct.pack("<HH", 60_000, 60_000)
        frame = raw.index(b",", 13)
        raw[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    else:
        (first,) = struct.unpack("<I", raw[4:8])
        for entry in range(first + 2, first + 26, 12):  # width and height come first
            raw[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 60_000)
    with pytest.raises(SampleError, match=r"a\.png .*exceeds limit"):
        decode(io.BytesIO(bytes(raw)), "a.png")
