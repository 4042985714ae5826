# SPDX-License-Identifier: Apache-2.0
"""`visprune calibrate vtw`: the divergences are those of the formula, and the layer follows."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

import visprune
from tests import tiny
from visprune.cli import commands as cli
from visprune.errors import ConfigError
from visprune.eval.calibrate.vtw import Withdrawal, calibrate, find_layer


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["visprune", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@torch.no_grad()
def test_the_divergence_is_summed_up_word_by_word() -> None:
    model = tiny.build("llava")
    batches = [
        tiny.inputs("llava", [[3, "a", 6], [2, "b", 3]]),
        tiny.inputs("llava", [[4, "c", 5]]),
    ]
    found = find_layer(model, batches, threshold=0.05, first=1)
    assert list(found.divergence) == [1, 2, 3]
    assert found.prompts == 3
    for layer, value in found.divergence.items():
        total = 0.0
        for inputs in batches:
            plain = model(**inputs).logits[:, -1].double().softmax(-1)
            with visprune.prune(model, "vtw", layer=layer):
                pruned = model(**inputs).logits[:, -1].double().softmax(-1)
            for p, q in zip(pruned, plain, strict=True):
                total += sum(
                    float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True)
                )
        assert value == pytest.approx(total / 3, rel=1e-5, abs=1e-9)
    assert any(found.divergence.values())
    assert not visprune.runs(model)  # type: ignore[attr-defined]


def test_the_layer_is_the_first_within_the_threshold() -> None:
    values = {5: 0.2, 6: 0.01, 7: 0.003, 8: 0.5, 9: 0.0}
    assert Withdrawal(values, 0.003, 20).layer == 7
    assert Withdrawal(values, 0.0, 20).layer == 9
    assert "vtw layer=7: the first within 0.003" in str(Withdrawal(values, 0.003, 20))
    lost = Withdrawal({5: 0.2}, 0.003, 20)
    assert lost.layer is None
    assert str(lost).endswith("no layer stays within 0.003: this model looks to the end")


def test_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("calibrate", "vtw", "embedded", "--device", "cpu", "--limit", "2", "--first")
    assert _run(monkeypatch, *words, "6", "--threshold", "100") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "layer   divergence (nats, mean of 2 prompts)"
    assert [line.split()[0] for line in out[1:-1]] == ["6", "7"]
    assert out[-1] == "vtw layer=6: the first within 100"
    assert _run(monkeypatch, *words, "99") == 2
    assert "decoder layers 0 to 7. Give one of those (--first)" in capsys.readouterr().err


def test_a_model_that_looks_to_the_end_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = Withdrawal({5: 0.2}, 0.003, 20)
    monkeypatch.setattr("visprune.eval.calibrate.vtw.calibrate", lambda *a, **k: none)
    assert _run(monkeypatch, "calibrate", "vtw", "embedded") == 1
    assert "no layer stays within 0.003" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"model": "some/model"}, "Give a task whose questions"),
        ({"model": "embedded", "task": "imagenet"}, "wants class numbers"),
        ({"model": "embedded", "task": "embeded"}, "embedded"),
        ({"model": "embedded", "threshold": -1.0, "limit": 1}, "at least 0, got -1.0"),
    ],
)
def test_what_cannot_be_calibrated(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        calibrate(**given)
    with pytest.raises(ConfigError, match="no prompt to find the layer on"):
        find_layer(tiny.build("llava"), [], first=1)
