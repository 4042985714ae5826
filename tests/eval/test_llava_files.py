# SPDX-License-Identifier: Apache-2.0
"""LLaVA's question and answer files: written, read back, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.eval.task_fixtures import LOCAL, dump, dump_lines, save, vqav2_test_dev
from visprune.errors import ConfigError
from visprune.eval.llava_files import (
    read_answers,
    score_answers,
    write_answers,
    write_questions,
    write_submission,
)
from visprune.eval.tasks.base import Task, get_task

TASKS: dict[str, dict[str, Any]] = {
    "vqav2": {},
    "textvqa": {"ocr": True},
    "pope": {},
    "mme": {},
    "mmbench_en": {},
    "seedbench_image": {},
}


def _task(name: str, root: Path) -> Task:
    LOCAL[name](root)
    return get_task(name, data=str(root), **TASKS[name])


def _records(task: Task, texts: list[str] | None = None) -> list[Any]:
    """Records with the right answers, or with these texts."""
    found = []
    for number, sample in enumerate(task.samples()):
        right = max(set(sample.answers), key=sample.answers.count)
        found.append(
            SimpleNamespace(
                sample=sample.id,
                prompt=task.prompt(sample),
                text=right if texts is None else texts[number],
                kind=sample.kind,
            )
        )
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", TASKS)
def test_answers_come_back(tmp_path: Path, name: str) -> None:
    task = _task(name, tmp_path / "data")
    path = tmp_path / "answers.jsonl"
    assert write_answers(path, _records(task), "a-model") == len(task.samples())
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert all(list(line) == keys for line in _lines(path))
    assert len({line["answer_id"] for line in _lines(path)}) == len(task.samples())
    answers = read_answers(path, task)
    assert [answer.sample for answer in answers] == [sample.id for sample in task.samples()]
    assert {answer.score for answer in answers} == {1.0}
    assert score_answers(path, task)["score"] == (400.0 if name == "mme" else 100.0)


def test_questions_are_llava_s(tmp_path: Path) -> None:
    task = _task("pope", tmp_path / "data")
    assert write_questions(task, tmp_path / "questions.jsonl") == 6
    first = _lines(tmp_path / "questions.jsonl")[0]
    assert list(first) == ["question_id", "image", "text", "category"]
    assert first["text"] == task.prompt(task.samples()[0])
    assert Path(first["image"]).is_file()


def test_pictures_that_are_no_files_are_saved(tmp_path: Path) -> None:
    task = get_task("embedded", limit=3)
    with pytest.raises(ConfigError, match="not a file of its own; pass images=FOLDER"):
        write_questions(task, tmp_path / "questions.jsonl")
    write_questions(task, tmp_path / "questions.jsonl", "plain", images=tmp_path / "pictures")
    for line in _lines(tmp_path / "questions.jsonl"):
        assert (tmp_path / "pictures" / line["image"]).is_file()


def test_llava_s_own_files_of_textvqa_and_mme(tmp_path: Path) -> None:
    # Their question ids are those of pictures: the prompt tells questions apart.
    for name in ("textvqa", "mme"):
        task = _task(name, tmp_path / name)
        rows = [
            {"question_id": sample.cluster, "prompt": task.prompt(sample), "text": text}
            for sample, text in zip(
                task.samples(), ["dakota", "x"] if name == "textvqa" else ["Yes"] * 8, strict=True
            )
        ]
        dump_lines(tmp_path / "answers.jsonl", rows[::-1])
        answers = read_answers(tmp_path / "answers.jsonl", task)
        assert [answer.text for answer in answers] == [row["text"] for row in rows]


def test_llava_s_own_files_of_pope_need_its_questions(tmp_path: Path) -> None:
    task = _task("pope", tmp_path / "data")
    questions = [
        {
            "question_id": 100 + number,  # numbers of the file's own
            "image": "COCO_val2014_000000310196.jpg",
            "text": task.prompt(sample),
            "category": sample.kind,
        }
        for number, sample in enumerate(task.samples())
    ]
    dump_lines(tmp_path / "llava_pope_test.jsonl", questions)
    answers = [
        {"question_id": row["question_id"], "prompt": row["text"], "text": "Yes"}
        for row in questions
    ]
    dump_lines(tmp_path / "answers.jsonl", answers)
    with pytest.raises(ConfigError, match="6 of its questions are not asked"):
        score_answers(tmp_path / "answers.jsonl", task)
    figures = score_answers(tmp_path / "answers.jsonl", task, tmp_path / "llava_pope_test.jsonl")
    assert figures["yes_rate"] == 100.0
    assert figures["score"] == pytest.approx(200 / 3)


def test_an_answer_file_of_another_run_is_refused(tmp_path: Path) -> None:
    task = _task("vqav2", tmp_path / "data")
    path = tmp_path / "answers.jsonl"
    other = get_task("embedded", limit=3)
    write_answers(path, _records(other), "m")
    message = r"not an answer file of vqav2.*3 of its questions.*3 of 3 have no answer.*Check task"
    with pytest.raises(ConfigError, match=message):
        read_answers(path, task)
    write_answers(path, _records(task)[:2], "m")
    with pytest.raises(ConfigError, match=r"0 of its questions.*1 of 3 have no answer \(73000\)"):
        read_answers(path, task)
    write_answers(path, [*_records(task), _records(task)[0]], "m")
    with pytest.raises(ConfigError, match="line 4 answers 42000 again; are two runs in one file"):
        read_answers(path, task)


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    task = _task("vqav2", tmp_path / "data")
    dump_lines(tmp_path / "a.jsonl", [{"question_id": 1, "answer": "x"}])
    with pytest.raises(ConfigError, match="line 1 has no column 'text'"):
        read_answers(tmp_path / "a.jsonl", task)


def test_records_with_errors_have_no_answer(tmp_path: Path) -> None:
    task = _task("vqav2", tmp_path / "data")
    records = _records(task)
    records[0].text = None
    assert write_answers(tmp_path / "a.jsonl", records, "m") == 2


def _handed_in(task: Task, *texts: str) -> list[Any]:
    pairs = zip(task.samples(), texts, strict=True)
    return [SimpleNamespace(sample=sample.id, text=text, score=None) for sample, text in pairs]


def test_test_dev_is_answered_and_handed_in(tmp_path: Path) -> None:
    vqav2_test_dev(tmp_path)
    task = get_task("vqav2", data=str(tmp_path), split="test-dev")
    assert task.scored is False
    first = task.samples()[0]
    assert (first.question, first.answers, first.cluster) == ("Is the ball flying?", (), "262144")
    assert first.image().size == (12, 8)
    records = _handed_in(task, "Yes.", "The Tennis")
    assert task.aggregate(records) == {}  # no score is made up
    path = tmp_path / "out.json"
    questions = tmp_path / "llava_vqav2_mscoco_test2015.jsonl"
    assert write_submission(path, task, records, questions) == 3
    assert json.loads(path.read_text()) == [
        {"question_id": 1000, "answer": ""},
        {"question_id": 262144000, "answer": "yes"},
        {"question_id": 262144001, "answer": "tennis"},
    ]


def test_vizwiz_is_handed_in_by_picture(tmp_path: Path) -> None:
    dump(tmp_path / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What?"}])
    save(tmp_path / "test/VizWiz_test_00000000.jpg")
    task = get_task("vizwiz", data=str(tmp_path), split="test")
    write_submission(tmp_path / "out.json", task, _handed_in(task, "Unanswerable"))
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}
    ]
    broken = [SimpleNamespace(sample="x", text=None)]
    with pytest.raises(ConfigError, match="x has no answer to hand in"):
        write_submission(tmp_path / "out.json", task, broken)
    with pytest.raises(ConfigError, match="embedded is not handed in anywhere"):
        write_submission(tmp_path / "out.json", get_task("embedded", limit=1), [])
