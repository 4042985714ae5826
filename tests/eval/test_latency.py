# SPDX-License-Identifier: Apache-2.0
"""Timing side by side: order, warm-up, what is inside the time, and what describes the machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from visprune.errors import ConfigError
from visprune.eval.environment import describe, describe_line, set_threads, writable_folder
from visprune.eval.speed.latency import Case, Timings, interleaved


def test_cases_take_turns_forwards_then_backwards() -> None:
    order: list[str] = []
    cases = [Case(name, lambda _, name=name: order.append(name)) for name in "abc"]
    timings = interleaved(cases, rounds=2, warmup=0)
    assert order == ["a", "b", "c", "c", "b", "a"]
    assert {name: len(times) for name, times in timings.seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_warm_up_rounds_run_and_are_not_counted() -> None:
    turns: list[int] = []
    after: list[tuple[int, str]] = []
    case = Case("a", lambda turn: turns.append(turn) or f"result {turn}")
    timings = interleaved(
        [case], rounds=2, warmup=2, after=lambda case, turn, result: after.append((turn, result))
    )
    assert turns == [0, 0, 0, 1]
    assert after == [(-2, "result 0"), (-1, "result 0"), (0, "result 0"), (1, "result 1")]
    assert len(timings.seconds["a"]) == 2


def test_each_settles_before_it_is_timed() -> None:
    runs: list[int] = []
    first = Case("a", lambda turn: time.sleep(0.2 if runs.append(turn) or len(runs) == 1 else 0.0))
    timings = interleaved([first], rounds=2, warmup=0, settle=True)
    assert runs == [0, 0, 1, 1]
    assert max(timings.seconds["a"]) < 0.1


def test_what_is_around_a_run_is_not_timed() -> None:
    events: list[str] = []

    @contextmanager
    def slow() -> Iterator[None]:
        events.append("in")
        time.sleep(0.2)
        yield
        events.append("out")

    timings = interleaved([Case("a", lambda _: time.sleep(0.01), slow)], rounds=1, warmup=0)
    assert events == ["in", "out"]
    assert 0.01 <= timings.seconds["a"][0] < 0.2


def test_ratios_are_taken_within_rounds() -> None:
    # The machine slows tenfold in the second round; the ratio stays what it is.
    timings = Timings({"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]})
    assert timings.ratio("slow", "fast") == 2.0
    assert timings.median_ms("slow") == 2000.0
    assert Timings({"a": [1.0, 2.0, 3.0, 4.0, 5.0]}).iqr_ms("a") == pytest.approx(2000.0)


@pytest.mark.parametrize(
    ("names", "rounds"), [([], 1), (["a", "a"], 1), (["a"], 0)], ids=["none", "twice", "no round"]
)
def test_bad_requests_are_refused(names: list[str], rounds: int) -> None:
    with pytest.raises(ConfigError, match="different names and at least one round"):
        interleaved([Case(name, lambda _: None) for name in names], rounds=rounds)


def test_the_environment_is_named_and_fits_json() -> None:
    described = json.loads(json.dumps(describe()))
    assert described["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert described["cpu"]
    assert described["threads"] == torch.get_num_threads()
    line = describe_line(described)
    assert described["cpu"] in line
    assert described["versions"]["transformers"] in line


def test_threads_are_at_most_two_unless_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads(None) <= 2
        assert set_threads(3) == torch.get_num_threads() == 3
        with pytest.raises(ConfigError, match="at least 1, got 0"):
            set_threads(0)
    finally:
        torch.set_num_threads(before)


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = writable_folder(tmp_path / "a" / "b")
    assert list(folder.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.write_text("x")
    with pytest.raises(ConfigError, match=r"Cannot write into .*taken"):
        writable_folder(target)
    with pytest.raises(ConfigError, match=r"Cannot write into .*taken"):
        writable_folder(target / "below")
