# SPDX-License-Identifier: Apache-2.0
"""Records: identity, torn lines, a full disk, files of another run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from visprune.errors import ConfigError
from visprune.eval.records import files as record_files
from visprune.eval.records.files import read_lines
from visprune.eval.records.folder import ResultsFolder, read_records, write_json
from visprune.eval.records.record import Cell, Record, merge


def a_cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "model": {"name": "m", "weights": "0"},
        "method": {"method": "todre", "num_keep": 64},
        "task": {"task": "t", "version": 1},
        "prompt_style": "plain",
        "label": "todre 64",
        "num_keep": 64,
    }
    return Cell(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    made = ResultsFolder(tmp_path / "results", create=True)
    made.add_cells([a_cell()])
    return made


def test_the_id_of_a_cell_follows_from_what_changes_an_answer_and_from_nothing_else() -> None:
    cell = a_cell()
    assert len(cell.id) == 16
    for same in ({"label": "x"}, {"num_keep": None}, {"control": True}, {"refused": "why"}):
        assert a_cell(**same).id == cell.id
    for other in (
        {"model": {"name": "m", "weights": "1"}},
        {"method": {"method": "todre", "num_keep": 65}},
        {"task": {"task": "t", "version": 2}},
        {"prompt_style": "chat"},
        {"generation": {"max_new_tokens": 3}},
        {"seed": 1},
    ):
        assert a_cell(**other).id != cell.id


def test_the_key_also_follows_the_prompt_and_the_picture() -> None:
    cell = a_cell()
    keys = {cell.key("a", "1"), cell.key("b", "1"), cell.key("a", "2"), cell.key("a", None)}
    assert len(keys) == 4
    assert len(cell.key("\udc80", None)) == 64  # a lone surrogate


def test_a_cell_comes_back_and_an_edited_one_is_refused(folder: ResultsFolder) -> None:
    assert folder.cells() == {a_cell().id: a_cell()}
    path = folder.path / "cells" / f"{a_cell().id}.json"
    values = json.loads(path.read_text())
    values["method"]["num_keep"] = 32
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="was changed"):
        folder.cells()


def test_a_record_comes_back_as_it_was(folder: ResultsFolder) -> None:
    record = Record(
        cell=a_cell().id,
        sample="a",
        key="k",
        question="lone \udc80, separator \u2028, 猫",
        answers=("x",),
        text="line\nline",
        score=0.3,
        macs={"vision": 2**60},
        meta={"box": [1, 2]},
    )
    with folder.writer() as writer:
        writer.write([record])
    assert folder.records() == [record]


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match="Sample 'a' cannot be written"):
        Record(cell="c", sample="a", meta={"x": float("nan")}).line()


def test_a_torn_last_line_is_left_out_and_nothing_before_it(folder: ResultsFolder) -> None:
    with folder.writer() as writer:
        writer.write(Record(cell=a_cell().id, sample=str(i)) for i in range(3))
    whole = writer.path.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(last, len(whole)):
        writer.path.write_bytes(whole[:end])
        assert [record.sample for record in folder.records()] == ["0", "1"]


def test_damage_before_the_last_line_is_named(folder: ResultsFolder) -> None:
    path = folder.path / "records-x.jsonl"
    line = Record(cell=a_cell().id, sample="a").line()
    path.write_bytes(line + line[:20] + b"\n" + line)
    with pytest.raises(ConfigError, match=rf"records-x.jsonl.*byte {len(line)} is no record"):
        folder.records()


def test_records_of_another_run_or_version_are_refused(folder: ResultsFolder) -> None:
    stranger = folder.path / "records-stranger.jsonl"
    stranger.write_bytes(Record(cell="f" * 16, sample="a").line())
    with pytest.raises(ConfigError, match=r"records-stranger.*another run"):
        read_records(folder.path)
    stranger.write_text(json.dumps({"v": 2, "cell": "c", "sample": "s"}) + "\n")
    with pytest.raises(ConfigError, match="version 2"):
        folder.records()


def test_a_file_is_never_appended_to_by_a_second_process(folder: ResultsFolder) -> None:
    with folder.writer() as first, folder.writer() as second:
        first.write([Record(cell=a_cell().id, sample="a")])
        second.write([Record(cell=a_cell().id, sample="b")])
    assert first.path != second.path
    assert [record.sample for record in folder.records()] == ["a", "b"]


def test_repeats_collapse_to_the_first_without_an_error() -> None:
    failed = Record(cell="c", sample="a", error={"type": "X", "message": ""})
    right = Record(cell="c", sample="a", text="right")
    later = Record(cell="c", sample="a", text="later")
    assert merge([failed, right, later]) == [right]
    assert merge([right, failed]) == [right]
    assert merge([failed]) == [failed]


def test_the_order_of_lines_says_nothing(folder: ResultsFolder) -> None:
    records = [Record(cell=a_cell().id, sample=str(i)) for i in range(5)]
    assert merge(records) == merge(reversed(records))


@pytest.mark.parametrize("room", [0, 40, 10_000])
def test_a_full_disk_is_named_and_what_was_written_is_safe(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The disk takes ``room`` more bytes, the last write of which is cut."""
    cell = a_cell().id
    writer = folder.writer()
    writer.write([Record(cell=cell, sample="first")])
    real, left = os.write, room

    def full(file: int, data: Any) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(file, bytes(data)[:left])
        left -= count
        return count

    monkeypatch.setattr(record_files.os, "write", full)

    def fill() -> None:
        for number in range(200):
            writer.write([Record(cell=cell, sample=f"{number:03}")])

    with pytest.raises(ConfigError, match=r"disk is full.*free some space"):
        fill()
    monkeypatch.undo()
    writer.close()
    names = [record.sample for record in folder.records()]
    assert names == [f"{i:03}" for i in range(len(names) - 1)] + ["first"]
    with folder.writer() as again:
        again.write([Record(cell=cell, sample="later")])
    assert len(folder.records()) == len(names) + 1


def test_json_files_are_whole_or_absent(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.path / "study.json"
    write_json(path, {"name": "old"})

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConfigError, match="No space left"):
        write_json(path, {"name": "new"})
    monkeypatch.undo()
    assert folder.study == {"name": "old"}
    assert [p.name for p in folder.path.iterdir() if p.is_file()] == ["study.json"]


def test_a_broken_byte_in_the_command_is_written(folder: ResultsFolder) -> None:
    name = folder.add_environment({"command": "eval \udc80.yaml"})
    assert folder.environments()[name] == {"command": "eval \udc80.yaml"}


def test_what_is_no_results_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not there"):
        ResultsFolder(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no results folder"):
        ResultsFolder(tmp_path)


def test_reading_goes_on_where_it_stopped(folder: ResultsFolder) -> None:
    with folder.writer() as writer:
        writer.write([Record(cell=a_cell().id, sample="a")])
        (end, values), *rest = read_lines(writer.path)
        assert values["sample"] == "a"
        assert not rest
        writer.write([Record(cell=a_cell().id, sample="b")])
        assert [v["sample"] for _, v in read_lines(writer.path, end)] == ["b"]


def test_processes_that_start_together_do_not_trip_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one proves the same folder between this one's two steps."""
    write, turns = Path.write_bytes, [os.getpid() + 1]

    def meanwhile(self: Path, data: bytes) -> int:
        count = write(self, data)
        if turns:
            with monkeypatch.context() as patch:
                other = turns.pop()
                patch.setattr(os, "getpid", lambda: other)
                ResultsFolder(tmp_path, create=True)
        return count

    monkeypatch.setattr(Path, "write_bytes", meanwhile)
    ResultsFolder(tmp_path, create=True)
    assert not turns
    assert not [path.name for path in tmp_path.iterdir() if path.is_file()]
