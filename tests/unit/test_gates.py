# SPDX-License-Identifier: Apache-2.0
"""Gates of heads: as numbers, from a file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import visprune
from visprune.core.method import ModelSpec
from visprune.errors import ConfigError

ROWS = [[0.5, 0.25], [], [1, 0]]
SPEC = ModelSpec("llava", num_layers=3, has_cls=True, multi_axis_rope=False)
both = pytest.mark.parametrize("name", ["duo_attention", "razor_attention"])


@both
def test_a_file_stands_for_its_numbers(name: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.json"
    file.write_text(json.dumps({"gates": ROWS, "prompts": 3}), encoding="utf-8")
    plain = visprune.get_method(name, num_keep=4, gates=ROWS)
    read = visprune.get_method(name, num_keep=4, gates=str(file))
    assert plain == read == visprune.get_method(name, num_keep=4, gates=file)
    # What is saved with a model needs the file no more.
    params = {k: v for k, v in read.to_dict().items() if k != "method"}
    file.unlink()
    assert visprune.get_method(name, **json.loads(json.dumps(params))) == read
    assert read.eviction(SPEC).budget.gates == ((0.5, 0.25), (), (1.0, 0.0))  # type: ignore[attr-defined]


@both
@pytest.mark.parametrize(
    ("gates", "match"),
    [
        ("nowhere.json", "is no file of `visprune calibrate heads`"),
        ([0.5, 0.25], "one row of finite numbers for each layer"),
        ([[0.5, "high"]], "one row of finite numbers"),
        ([[float("nan")]], "one row of finite numbers"),
        (7, "one row of finite numbers"),
        ([], "one row of finite numbers"),
    ],
)
def test_what_is_no_gates(name: str, gates: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as found:
        visprune.get_method(name, num_keep=4, gates=gates)
    assert name in str(found.value)


@both
def test_files_of_another_kind(name: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.json"
    for text, match in (("{", "is no file of"), ("[[1.0]]", "has no entry 'gates'"), ("{}", "has")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=match):
            visprune.get_method(name, num_keep=4, gates=file)
