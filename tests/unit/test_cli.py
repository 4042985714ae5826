# SPDX-License-Identifier: Apache-2.0
"""The command line: what it passes on, and one clean line where something is wrong."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import visprune
from visprune.cli import commands as cli
from visprune.core.registry import Registry
from visprune.errors import BudgetError, ConfigError, UnsupportedModel


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["visprune", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Replace what the commands call by a recorder, and return what it recorded."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))

    targets = {
        "visprune.eval.demo.run": "run_demo",
        "visprune.eval.show.vlm": "show",
        "visprune.train": "train",
    }
    for module, function in targets.items():
        fake = ModuleType(module)
        setattr(fake, function, record)
        monkeypatch.setitem(sys.modules, module, fake)
    return seen


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"visprune {visprune.__version__}\n"


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    for name in ("demo", "show", "check", "methods", "models", "tasks", "bench", "train"):
        assert f" {name} " in out


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    assert _run(monkeypatch, "demo", "--limit", "7", "--out", "there", "--threads", "2") == 0
    assert calls == [((), {"out": Path("there"), "limit": 7, "threads": 2})]


def test_show_passes_its_options_on(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    words = ["show", "a.png", "--question", "What?", "--method", "fastv", "--num-keep", "32"]
    assert _run(monkeypatch, *words) == 0
    wanted = {"question": "What?", "method": "fastv", "num_keep": 32, "out": Path("kept.png"),
              "pad": False}  # fmt: skip
    assert calls == [((Path("a.png"),), {**wanted, "model": None})]


def test_train_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    words = ["train", "r.yaml", "a.steps=3", "--out", "o", "--set", "b=[x, y]", "--resume"]
    assert _run(monkeypatch, *words) == 0
    wanted = {"overrides": {"a.steps": 3, "b": ["x", "y"]}, "resume": True}
    assert calls == [((Path("r.yaml"), Path("o")), wanted)]


@pytest.mark.parametrize("option", [["--set"], []])
@pytest.mark.parametrize("pair", ["steps", "=3", "steps=[1"])
def test_train_refuses_what_is_not_key_and_value(
    pair: str,
    option: list[str],
    monkeypatch: pytest.MonkeyPatch,
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(monkeypatch, "train", "r.yaml", "--out", "o", *option, pair) == 2
    assert repr(pair) in capsys.readouterr().err
    assert calls == []


def test_lists_are_one_line_each_with_the_first_line_of_the_docstring(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = {
        "short": "visprune.core.registry:Registry",
        "longer_name": "visprune.errors:BudgetError",
    }
    cli._print_registry(Registry("thing", table))
    assert capsys.readouterr().out.splitlines() == [
        f"short        {Registry.__doc__.splitlines()[0]}",
        f"longer_name  {BudgetError.__doc__}",
    ]


@pytest.mark.parametrize("family", [ConfigError, BudgetError, UnsupportedModel])
def test_our_errors_are_one_line_and_exit_code_2(
    family: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calls: list[Any],
) -> None:
    def fail(**kwargs: Any) -> None:
        raise family("No [bold] file\n  'x.png'. " + "Long. " * 40)

    monkeypatch.setattr(sys.modules["visprune.eval.demo.run"], "run_demo", fail)
    assert _run(monkeypatch, "demo") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"visprune: No [bold] file 'x.png'. {('Long. ' * 40).strip()}\n"


def test_what_was_noted_of_an_error_is_said_behind_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    """Such as the sample that a task failed on."""

    def fail(**kwargs: Any) -> None:
        error = ConfigError("gqa scored 2.0.")
        error.add_note("It was of its sample '7'.")
        raise error

    monkeypatch.setattr(sys.modules["visprune.eval.demo.run"], "run_demo", fail)
    assert _run(monkeypatch, "demo") == 2
    assert capsys.readouterr().err == "visprune: gqa scored 2.0. It was of its sample '7'.\n"


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.jsonl")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "visprune: cannot write 'log.jsonl': No space left on device.\n"
    )


def test_other_errors_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    def fail(**kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sys.modules["visprune.eval.demo.run"], "run_demo", fail)
    monkeypatch.setattr(sys, "argv", ["visprune", "demo"])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()


def test_unknown_benchmark_lists_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_benchmarks", lambda: {"prefill": "a.b", "greedy_diverse": "c.d"})
    assert _run(monkeypatch, "bench", "prefil") == 2
    assert capsys.readouterr().err == (
        "visprune: Unknown benchmark 'prefil'. Did you mean 'prefill'? "
        "Known: prefill, greedy_diverse.\n"
    )


def test_bench_hands_further_words_to_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    fake = ModuleType("fake_bench")
    fake.main = lambda: seen.append(list(sys.argv))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_bench", fake)
    monkeypatch.setattr(cli, "_benchmarks", lambda: {"prefill": "fake_bench"})
    assert _run(monkeypatch, "bench", "prefill", "--threads", "2") == 0
    assert seen == [["visprune bench prefill", "--threads", "2"]]


def test_help_behind_a_benchmark_is_that_of_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "bench", "prefill", "--help") == 0
    said = capsys.readouterr().out
    assert "usage: visprune bench prefill" in said
    assert "--rounds" in said
    for words in (["bench", "--help"], ["bench", "-h"]):
        assert _run(monkeypatch, *words) == 0
        assert "Options after NAME go to that" in capsys.readouterr().out


def test_every_benchmark_that_is_listed_has_a_main() -> None:
    found = cli._benchmarks()
    root = Path(cli.__file__).parents[1]
    for module in found.values():
        path = root.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert "\ndef main(" in path.read_text(encoding="utf-8")
    assert "prefill" in found
