# SPDX-License-Identifier: Apache-2.0
"""``import visprune`` and the command line start without the libraries that they may need later."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.repo import run_python

HEAVY = ["transformers", "timm", "open_clip", "torchvision", "matplotlib", "datasets", "accelerate"]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import visprune", HEAVY),
        ("import visprune.cli.commands", [*HEAVY, "torch"]),
    ],
)
def test_stays_light(statement: str, absent: list[str], tmp_path: Path) -> None:
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    assert run_python(code, cwd=tmp_path) == "[]"


SLOW = [*HEAVY, "torch", "torchmetrics"]


@pytest.mark.parametrize(
    "module",
    ["visprune.catalog", "visprune.cli.checks", "visprune.eval.tasks.base",
     "visprune.eval.models.names", "visprune.eval.records.place", "visprune.core.registry",
     "visprune.core.numeric"],
)  # fmt: skip
def test_what_commands_check_names_with_is_light(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print([m for m in {SLOW!r} if m in sys.modules])"
    assert run_python(code, cwd=tmp_path) == "[]"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--help", 0, "eval"),
        ("eval --help", 0, "--num-keep"),
        ("eval --bogus", 2, "No such option"),
        ("eval --num-keep many", 2, "--num-keep"),
        ("eval --model embedded --task popes", 2, "Did you mean 'pope'"),
        ("eval --model embedded --method todree --num-keep 4", 2, "Did you mean 'todre'"),
        ("eval --method tomee,r=4", 2, "Did you mean 'tome'"),
        ("eval --model embeddd --out o", 2, "Did you mean 'embedded'"),
        ("eval --model tim:vit_tiny --out o", 2, "Did you mean 'timm'"),
        ("eval --model embedded --out o --dtype float23", 2, "Did you mean 'float32'"),
        ("eval --model embedded --out o --engine vlm", 2, "Did you mean 'vllm'"),
        ("eval --model embedded --out o --prompt-style odd", 2, "Allowed: llava15, chat, plain"),
        ("eval --task embedded --out o", 2, "or --model and --task"),
        ("eval --model embedded", 2, "name it with --out DIR"),
        ("eval nothing.yaml", 2, "There is no study 'nothing.yaml'"),
        ("eval study.yaml", 2, "Did you mean 'divprune'"),
        ("show nothing.png --question ?", 2, "nothing.png' is not there"),
        ("show study.yaml --question ? --method todree", 2, "Did you mean 'todre'"),
        ("show study.yaml --question ? --model embeddd", 2, "Did you mean 'embedded'"),
        ("check embeddd", 2, "Did you mean 'embedded'"),
        ("report nowhere", 2, "'nowhere' is not there"),
        ("report .", 2, "is no results folder"),
        ("compare nowhere:todre elsewhere", 2, "'nowhere' is not there"),
        ("bench nope", 2, "Unknown benchmark 'nope'"),
        ("train nothing.yaml --out o", 2, "There is no recipe"),
        ("methods", 0, "todre"),
        ("models", 0, "LLaVA-1.5"),
        ("tasks", 0, "POPE"),
    ],
)
def test_a_mistyped_word_waits_for_nothing_heavy(
    words: str, code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "study.yaml").write_text("tasks: [embedded]\nmethods: [{method: divprun}]\n")
    program = (
        "import sys, contextlib, io\n"
        "from visprune.cli import main\n"
        f"sys.argv = ['visprune', *{words.split()!r}]\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n"
        "    try: main(); code = 0\n"
        "    except SystemExit as ended: code = ended.code or 0\n"
        f"heavy = [m for m in {SLOW!r} if m in sys.modules]\n"
        f"print(code, heavy, {said!r} in ' '.join(out.getvalue().split()) or out.getvalue())\n"
    )
    assert run_python(program, cwd=tmp_path, env={"COLUMNS": "200"}) == f"{code} [] True"
