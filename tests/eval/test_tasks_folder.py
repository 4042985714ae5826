# SPDX-License-Identifier: Apache-2.0
"""A user's own benchmark, the embedded questions, and what all tasks share."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.eval.task_fixtures import drawn, dump_lines, save
from visprune.cli import commands as cli
from visprune.errors import ConfigError
from visprune.eval.llava_files import score_answers
from visprune.eval.study import build_study
from visprune.eval.tasks import embedded
from visprune.eval.tasks.base import Sample, SampleError, Task, get_task, list_tasks, sample_of

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "What color?", "answers": ["red", "scarlet"]},
    {"image": "b.png", "question": "How many?", "answers": "two", "kind": "count", "id": "q2"},
    {"image": "a.png", "question": "And now?", "answers": 3},
]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with a JSONL and its pictures."""
    dump_lines(tmp_path / "bench.jsonl", ROWS)
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    return tmp_path


def _folder(path: Path, **options: Any) -> Task:
    return get_task("folder", path=str(path), **options)


def _scores(task: Task, *texts: str) -> list[float]:
    pairs = zip(task.samples(), texts, strict=True)
    return [task.score(sample, task.parse(text, sample)) for sample, text in pairs]


def test_a_jsonl(bench: Path) -> None:
    task = _folder(bench)
    first, second, third = task.samples()
    assert (task.metric_name, task.generates) == ("exact_match", True)
    assert (first.id, first.answers, first.kind, first.cluster) == (
        "0",
        ("red", "scarlet"),
        "",
        "a.png",
    )
    assert (second.id, second.answers, second.kind) == ("q2", ("two",), "count")
    assert (third.answers, third.cluster) == (("3",), "a.png")
    assert first.image().size == (12, 8)
    assert _scores(task, "Scarlet.", "2", "four") == [1.0, 1.0, 0.0]
    assert task.to_dict()["metric_name"] == "exact_match"
    assert list(_folder(bench / "bench.jsonl").samples()) == list(task.samples())


def test_choices_are_asked_for_by_letter(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": "Which?", "answers": "B", "choices": ["cat", "dog"]},
        {"image": "a.png", "question": "Which?", "answers": "cat", "choices": ["cat", "dog"]},
    ]
    dump_lines(tmp_path / "x.jsonl", rows)
    task = _folder(tmp_path)
    assert task.metric_name == "letter_match"
    assert [sample.answers for sample in task.samples()] == [("B",), ("A",)]
    assert _scores(task, "b", "(A) cat") == [1.0, 1.0]
    assert task.prompt(task.samples()[0]).startswith("Which?\nA. cat\nB. dog\nAnswer with the opt")


def test_rows_of_which_one_lacks_choices_are_refused(tmp_path: Path) -> None:
    row = {"image": "a.png", "question": "Which?", "answers": "cat"}
    dump_lines(tmp_path / "x.jsonl", [{**row, "choices": ["cat", "dog"]}, row, row])
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2 has no choices, and 1 of 3 rows have"):
        _folder(tmp_path)
    task = _folder(tmp_path, metric_name="exact_match")
    assert task.prompt(task.samples()[0], "plain") == "Which?"


def test_llava_s_placeholder_is_no_part_of_a_question(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": text, "answers": "x"}
        for text in ("<image>\nWhat color?", "What color?\n<image>", "What color?")
    ]
    dump_lines(tmp_path / "x.jsonl", rows)
    task = _folder(tmp_path)
    assert {task.prompt(sample, "plain") for sample in task.samples()} == {"What color?"}
    dump_lines(tmp_path / "x.jsonl", [{**rows[0], "question": "<image><image> Which differs?"}])
    with pytest.raises(
        ConfigError, match=r"line 1: the question has 2 <image>; a row is about one"
    ):
        _folder(tmp_path).samples()


def test_signs_that_carry_meaning_are_not_blanks(tmp_path: Path) -> None:
    answers = ["-5", "5%", "$5", ".5", "C++", "caf\u00e9", "Straße"]
    rows = [{"image": "a.png", "question": "?", "answers": text} for text in answers]
    dump_lines(tmp_path / "x.jsonl", rows)
    task = _folder(tmp_path)
    assert _scores(task, *answers) == [1.0] * 7
    assert _scores(task, "5", "5", "5", "5", "C", "cafe", "strase") == [0.0] * 7
    assert (
        _scores(task, "-5.", "5 percent", "$ 5", "0.5", "c++", "cafe\u0301", "STRASSE") == [1.0] * 7
    )


def test_answers_that_become_one_are_said_before_the_run(tmp_path: Path) -> None:
    row = {"image": "a.png", "question": "?"}
    told = ["vitamin A", "Vitamin.", "the cat", "cat!", "2", "two", "t-shirt", "t shirt", "#1", "1"]
    told += ["On the street.", "on street", "3-year-old", "3 year old", "7.", "7"]
    dump_lines(tmp_path / "x.jsonl", [{**row, "answers": text} for text in told])
    study = build_study({"models": "embedded", "tasks": {"task": "folder", "path": str(tmp_path)}})
    vitamins, numbers = study.notes
    assert re.search(r"'vitamin A' \(.*line 1\) and 'Vitamin\.' \(.*line 2\) are one", vitamins)
    assert re.search(r"'#1' .* and '1' .* are one, '1'", numbers)
    assert _folder(tmp_path, metric_name="gqa").notes() == ()
    dump_lines(
        tmp_path / "x.jsonl", [{**row, "answers": f"{n}{s}"} for n in range(5) for s in "*@"]
    )
    assert _folder(tmp_path).notes()[-1] == "folder: 2 more such answers."
    # Between digits, and behind them, a sign is no punctuation: ranges, decimals, feet and inches.
    told = ["3-4", "3 4", "1,5", "1 5", "6'", '6"']
    dump_lines(tmp_path / "x.jsonl", [{**row, "answers": text} for text in told])
    assert len(_folder(tmp_path).notes()) == 3


def test_the_named_metric_is_used(tmp_path: Path) -> None:
    answers = ["red"] * 2 + ["blue"] * 8
    dump_lines(tmp_path / "x.jsonl", [{"image": "a.png", "question": "?", "answers": answers}])
    task = _folder(tmp_path, metric_name="vqa_official")
    assert _scores(task, "red") == pytest.approx([0.6])
    assert _scores(_folder(tmp_path), "red") == [1.0]


def test_an_instruction_of_ones_own(bench: Path) -> None:
    sample = _folder(bench).samples()[0]
    assert _folder(bench, instruction="In one word.").prompt(sample) == "What color?\nIn one word."
    assert _folder(bench, instruction="").prompt(sample) == "What color?"


def test_an_image_folder(tmp_path: Path) -> None:
    for name, file in (("great_dane", "2.png"), ("great_dane", "1.png"), ("cat", "1.jpg")):
        save(tmp_path / name / file)
    (tmp_path / "cat/notes.txt").write_text("no picture")
    task = _folder(tmp_path)
    assert [sample.id for sample in task.samples()] == [
        "cat/1.jpg",
        "great_dane/1.png",
        "great_dane/2.png",
    ]
    assert [sample.answers for sample in task.samples()] == [
        ("cat",),
        ("great dane",),
        ("great dane",),
    ]
    assert _scores(task, "A cat.", "Great Dane", "dog") == [1.0, 1.0, 0.0]
    numbers = _folder(tmp_path, metric_name="top1")
    assert numbers.generates is False
    assert _scores(numbers, "0 1", "1 0", "0 1") == [1.0, 1.0, 0.0]
    lettered = _folder(tmp_path, metric_name="letter_match")
    assert _scores(lettered, "A", "B", "A") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_limit_of_an_image_folder_is_not_one_class(tmp_path: Path, name: str) -> None:
    counts = {"apple": 5, "pear": 2, "plum": 3}
    for label, count in counts.items():
        for number in range(count):
            save(tmp_path / label / f"{number}.png")
    where = {"path" if name == "folder" else "data": str(tmp_path)}

    def asked(limit: int | None) -> list[str]:
        return [sample.id for sample in get_task(name, limit=limit, **where).samples()]

    assert asked(4) == ["apple/0.png", "pear/0.png", "plum/0.png", "apple/1.png"]
    whole = asked(None)
    assert whole[-3:] == ["plum/2.png", "apple/3.png", "apple/4.png"]
    assert len(set(whole)) == 10


def test_limit_and_seed(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "question": f"{i}?", "answers": "x"} for i in range(50)]
    dump_lines(tmp_path / "x.jsonl", rows)
    ids = {
        seed: [sample.id for sample in _folder(tmp_path, limit=5, seed=seed).samples()]
        for seed in range(4)
    }
    assert ids[0] == ["0", "1", "2", "3", "4"]
    assert len({tuple(chosen) for chosen in ids.values()}) == 4
    assert all(chosen == sorted(chosen, key=int) for chosen in ids.values())
    assert [sample.id for sample in _folder(tmp_path, limit=5, seed=3).samples()] == ids[3]
    assert len(_folder(tmp_path, limit=500).samples()) == 50


def test_samples_survive_pickling(bench: Path) -> None:
    # Data loaders send them to other processes.
    for task in (_folder(bench), get_task("embedded", limit=3)):
        for sample in task.samples():
            again: Sample = pickle.loads(pickle.dumps(sample))
            assert again.image().tobytes() == sample.image().tobytes()


# --- the embedded questions -----------------------------------------------------------------------


def test_embedded_asks_what_the_demo_asks() -> None:
    task = get_task("embedded", limit=100)
    questions = [q for picture in embedded.load("test", 100) for q in picture.questions]
    samples = task.samples()
    assert [(s.id, s.question, *s.answers, s.kind) for s in samples] == [
        (q.id, q.text, q.answer, q.kind) for q in questions
    ]
    picture = embedded.make_sample("test", 0)
    assert samples[0].image().tobytes() == picture.image.tobytes()
    assert task.prompt(samples[0], "plain") == samples[0].question


def test_embedded_seeds_share_no_picture() -> None:
    clusters = [
        {sample.cluster for sample in get_task("embedded", limit=50, seed=seed).samples()}
        for seed in range(3)
    ]
    assert all(not a & b for a, b in itertools.combinations(clusters, 2))


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        ("yes", "yes", "exact"),
        (" No ", "no", "exact"),
        ("Yes, it is", "yes", "first_word"),
        ("red", None, ""),
        ("", None, ""),
    ],
)
def test_embedded_answers_are_words_of_the_kind(text: str, answer: str | None, rule: str) -> None:
    task = get_task("embedded", limit=20)
    sample = next(sample for sample in task.samples() if sample.kind == "existence")
    parsed = task.parse(text, sample)
    assert (parsed.answer, parsed.rule) == (answer, rule)
    assert task.score(sample, parsed) == float(answer == sample.answers[0])


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"imge": "a", "question": "?", "answers": "x"},
            r"no column 'image'\. Did you mean 'imge'",
        ),
        ({"image": "a", "question": "?", "answers": []}, "answers is empty"),
        ({"image": "a", "question": "?", "answers": ["", " "]}, "answers is empty"),
        ({"image": "a", "question": None, "answers": "x"}, "question is null"),
        ({"image": "a", "question": ["?"], "answers": "x"}, "question is a text"),
        ({"image": None, "question": "?", "answers": "x"}, "image is null"),
        ({"image": "", "question": "?", "answers": "x"}, "image is the path of a picture"),
        ({"image": "a", "question": "?", "answers": "The."}, "no output equals the answer 'The"),
        ({"image": "a", "question": "?", "answers": {"x": 1}}, "a text or a list of texts"),
        ({"image": "a", "question": "?", "answers": "x", "id": "0"}, "has the id '0', as"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: Any, message: str) -> None:
    good = {"image": "a", "question": "?", "answers": "x"}
    dump_lines(tmp_path / "x.jsonl", [good, row])
    with pytest.raises(ConfigError, match=rf"x\.jsonl, line 2.*{message}"):
        _folder(tmp_path).samples()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["red", "blue"], "has 2 answers; gqa compares with one"),
        ("Red", "under gqa no output equals the answer 'Red', since it lower-cases"),
        ("red.", "under gqa no output equals the answer 'red.'"),
    ],
)
def test_answers_that_gqa_cannot_score_are_refused(
    tmp_path: Path, answers: Any, message: str
) -> None:
    rows = [{"image": "a", "question": "?", "answers": text} for text in ("red", answers)]
    dump_lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(ConfigError, match=rf"x\.jsonl, line 2.*{message}"):
        _folder(tmp_path, metric_name="gqa").samples()
    dump_lines(tmp_path / "x.jsonl", rows[:1])
    assert _scores(_folder(tmp_path, metric_name="gqa"), "Red.") == [1.0]


def test_classes_that_a_metric_cannot_score_are_refused(tmp_path: Path) -> None:
    for name in ("A", "b"):
        save(tmp_path / name / "1.png")
    with pytest.raises(ConfigError, match="under exact_match no output equals the answer 'A'"):
        _folder(tmp_path).samples()
    with pytest.raises(ConfigError, match="one answer per picture, its class; vqa_official"):
        _folder(tmp_path, metric_name="vqa_official").samples()
    assert _scores(_folder(tmp_path, metric_name="letter_match"), "A", "b") == [1.0, 1.0]


def test_a_null_id_is_no_id(tmp_path: Path) -> None:
    row = {"image": "a", "question": "?", "answers": "x", "id": None}
    dump_lines(tmp_path / "x.jsonl", [row, row])
    assert [sample.id for sample in _folder(tmp_path).samples()] == ["0", "1"]


def test_an_answer_file_with_null_for_a_text_is_refused(bench: Path) -> None:
    answers = [{"question_id": name, "text": "x"} for name in ("0", "q2")]
    dump_lines(bench / "answers/a.jsonl", [*answers, {"question_id": "2", "text": None}])
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 3: text is null"):
        score_answers(bench / "answers/a.jsonl", _folder(bench))


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    good = json.dumps(
        {"image": "a", "question": "one\u2028two", "answers": "x"}, ensure_ascii=False
    )
    (tmp_path / "x.jsonl").write_text(f"{good}\n\n{good}\nnot json\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 4 is not JSON"):
        _folder(tmp_path).samples()
    (tmp_path / "x.jsonl").write_text(f"\ufeff{good}\n[1]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 2 is not a JSON object"):
        _folder(tmp_path).samples()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_name": "vqa_official"}, "has 2 answers; vqa_official compares with what several"),
        ({"metric_name": "letter_match"}, "line 1 has no choices"),
        ({"metric_name": "top1"}, "takes classes, an ImageFolder"),
        ({"metric_name": "exact"}, "no metric_name 'exact'. Did you mean 'exact_match'"),
        ({"metric": "exact_match"}, "no option 'metric'. Did you mean 'metric_name'"),
        ({"limit": 0}, "limit counts samples and is at least 1, got 0"),
        ({"seed": -1}, "seed is a whole number from 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1"),
    ],
)
def test_options_that_do_not_fit(bench: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        _folder(bench, **options).samples()


def test_folders_that_hold_nothing_of_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a \.jsonl file nor folders of pictures"):
        _folder(tmp_path).samples()
    with pytest.raises(ConfigError, match="no file or folder"):
        _folder(tmp_path / "nowhere").samples()
    (tmp_path / "a.csv").touch()
    with pytest.raises(ConfigError, match=r"is no \.jsonl file"):
        _folder(tmp_path / "a.csv").samples()
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match=r"a\.jsonl holds no line"):
        _folder(tmp_path).samples()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ConfigError, match=r"several \.jsonl files \(a\.jsonl, b\.jsonl\)"):
        _folder(tmp_path).samples()
    with pytest.raises(ConfigError, match="needs the option 'path'"):
        get_task("folder")


def test_a_missing_picture_is_one_sample_s_error(bench: Path) -> None:
    (bench / "a.png").unlink()
    first, second, _ = _folder(bench).samples()
    with pytest.raises(SampleError, match=r"bench\.jsonl, line 1 is missing: .*a\.png"):
        first.image()
    assert second.image().size == (12, 8)


def test_a_record_s_sample_has_no_picture(bench: Path) -> None:
    class Record:
        sample, question, kind, cluster = "7", "?", "k", "c"
        answers, choices, meta = ["x"], [], {}

    sample = sample_of(Record)
    assert (sample.id, sample.answers) == ("7", ("x",))
    with pytest.raises(SampleError, match="made from a record"):
        sample.image()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_every_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    dump_lines(tmp_path / "x.jsonl", [{"image": "a.tif", "question": "?", "answers": "x"}])
    drawn("red").convert(mode).save(tmp_path / "a.tif")
    assert _folder(tmp_path).samples()[0].image().mode == "RGB"


def test_tasks_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["visprune", "tasks"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_tasks()
    assert all(len(line.split()) > 3 for line in lines)


def test_a_built_task_takes_no_more_options() -> None:
    task = get_task("embedded", limit=3)
    assert get_task(task) is task
    with pytest.raises(ConfigError, match="already built; set limit"):
        get_task(task, limit=4)
    with pytest.raises(ConfigError, match="A task is a name or a Task, got int"):
        get_task(3)  # type: ignore[arg-type]
