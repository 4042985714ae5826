# SPDX-License-Identifier: Apache-2.0
"""Gates of heads measured on pictures: what is measured, the file, and what reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import visprune
from tests import tiny
from tests.contract.cases import batch, places
from visprune.backbones.hf.cache import cache_of
from visprune.backbones.hf.probe import Attended, Wanted, watch
from visprune.cli import app
from visprune.errors import ConfigError
from visprune.eval.calibrate.heads import find_gates, pictures_of
from visprune.machine.find import find_adapter

SINKS, KEEP, WINDOW = 2, 6, 3


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build("llava")


def by_loop(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The part of the text's attention that falls on what a stream drops, ``[layers, Hk]``."""
    adapter, rows = find_adapter(model), []
    _, free, _ = places("llava", inputs)[0]
    dropped = free[SINKS : len(free) - (KEEP - SINKS)]
    for layer in range(len(adapter.layers)):
        found: list[Attended] = []
        handle = watch(adapter.attention(layer), lambda found=found: Wanted(found.append))
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        query, key = found[0].query[0].double(), found[0].key[0].double()
        length, group = key.shape[1], len(query) // len(key)
        text = torch.arange(int(free[-1]) + 1, length)[-WINDOW:]
        gates = []
        for head in range(len(key)):
            mass = 0.0
            for h in range(head * group, (head + 1) * group):
                for at in text.tolist():
                    scores = query[h, at] @ key[head, : at + 1].T * found[0].scale
                    mass += float(scores.softmax(0)[dropped].sum())
            gates.append(mass / group / len(text))
        rows.append(gates)
    return torch.tensor(rows)


def test_gates_are_means_over_prompts(model: Any) -> None:
    prompts = [batch("llava", [[3, "a", 6]]), batch("llava", [[2, "b", 4, 8, 9, 11]])]
    want = torch.stack([by_loop(model, inputs) for inputs in prompts]).mean(0)
    found = find_gates(model, prompts, num_keep=KEEP, sinks=SINKS, window=WINDOW)
    assert found.prompts == 2
    assert torch.allclose(torch.tensor(found.gates), want, atol=1e-5)
    assert "mean of 2 prompts" in str(found)
    assert not visprune.runs(model)


def test_what_is_written_is_read(model: Any, tmp_path: Path) -> None:
    inputs = batch("llava", [[3, "a", 6]])
    found = find_gates(model, [inputs], num_keep=KEEP, sinks=SINKS)
    file = found.write(tmp_path / "gates.json")
    assert json.loads(file.read_text())["measured"] == {"num_keep": KEEP, "sinks": SINKS}
    flat = torch.tensor(found.gates).flatten()
    with visprune.prune(model, "duo_attention", num_keep=KEEP, gates=file, sparsity=0.5) as run:
        cache_of(model(**inputs, use_cache=True))
        slots = run.trace.cache.slots[0]
    length = inputs["input_ids"].shape[1]
    whole = (flat >= torch.quantile(flat, 0.5)).view(4, 2)
    assert [[n == length for n in layer] for layer in slots] == whole.tolist()
    assert {n for layer in slots for n in layer} == {length, length - 36 + KEEP}


def test_what_cannot_be_measured(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt with a picture"):
        find_gates(model, [batch("llava", [[3, 4, 6]])])
    with pytest.raises(ConfigError, match="has no parameter 'sink'"):
        find_gates(model, [], sink=4)
    with pytest.raises(ConfigError, match="There is no folder"):
        pictures_of(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no picture"):
        pictures_of(tmp_path)
    with visprune.prune(model, "snapkv", num_keep=3), pytest.raises(ConfigError, match="already"):
        find_gates(model, [batch("llava", [[3, "a", 6]])])
    gates = ((0.5,),) * 4
    with (
        visprune.prune(model, "duo_attention", num_keep=3, gates=gates),
        pytest.raises(ConfigError, match="gates has 1 numbers for decoder layer 0"),
    ):
        model(**batch("llava", [[3, "a", 6]]), use_cache=True)


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (96, 96), color).save(tmp_path / f"{number}.png")
    out = tmp_path / "gates.json"
    done = CliRunner().invoke(
        app,
        ["calibrate", "heads", "embedded", "--pictures", str(tmp_path), "--out", str(out),
         "--question", "What color is the circle?"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "mean of 2 prompts" in done.output
    rows = visprune.get_method("duo_attention", num_keep=64, gates=out).gates  # type: ignore[attr-defined]
    assert len(rows) == len(json.loads(out.read_text())["gates"]) == 8
