# SPDX-License-Identifier: Apache-2.0
"""`visprune check`: a model by name, with its processor, and a picture or none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import visprune
from visprune.backbones.vlm import embedded
from visprune.cli import commands as cli
from visprune.errors import ConfigError
from visprune.eval.check.run import drawn


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["visprune", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_embedded_model_is_safe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "check", "embedded", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert out.startswith("LlavaForConditionalGeneration (llava), transformers ")
    assert "visual tokens per decoder layer: 576 x 8 -> 384 x 4, 192 x 4" in out
    assert "key-value cache after the prompt: 4.6 MiB -> 2.3 MiB" in out
    assert out.rstrip().endswith("safe to prune")


def test_a_model_with_its_processor_and_a_picture(tmp_path: Path) -> None:
    model, processor = embedded.load(torch.bfloat16)
    picture = tmp_path / "a.png"
    drawn().rotate(90, expand=True).save(picture)
    one = visprune.check((model, processor), picture=picture)
    assert one.safe, one
    assert "bfloat16 on cpu" in one.setting
    model.config._name_or_path = str(embedded.WEIGHTS)
    assert visprune.check(model, picture=drawn()).safe  # its processor is where it came from
    plain = visprune.check((model, processor), picture=Image.new("RGB", (300, 200), "green"))
    assert plain.safe or "rounding may hide" in plain.verdict  # there is nothing to see in it
    with pytest.raises(ConfigError, match="not there"):
        visprune.check((model, processor), picture=tmp_path / "b.png")


def test_what_is_not_safe_ends_with_it_and_with_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from visprune.machine.decoder.forward import Forward

    def wrong(self: Any, table: Any, layer: int) -> Any:
        return self.full_positions()[:, : table.num_slots]

    monkeypatch.setattr(Forward, "table_positions", wrong)
    assert _run(monkeypatch, "check", "embedded", "--device", "cpu") == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("not safe to prune: drop = hide: differs by ")
    assert last.endswith("The positions that decoder layer 0 is given are not its tokens'.")


def test_a_mistyped_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "check", "embeddet") == 2
    assert "There is no model 'embeddet'. Did you mean 'embedded'?" in capsys.readouterr().err
