# SPDX-License-Identifier: Apache-2.0
"""The speed benchmarks: results are compared before anything is timed, and a wrong one is told."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visprune.catalog import get_method
from visprune.cli import commands as cli
from visprune.core import Selection
from visprune.errors import ConfigError, VispruneError
from visprune.eval.speed import (
    bench_cache,
    bench_decode,
    bench_eval,
    bench_methods,
    bench_prefill,
    ideal,
)
from visprune.eval.speed.bench_prefill import METHODS, agree, pair_up
from visprune.eval.speed.ideal import ideal_of, prompt
from visprune.eval.speed.latency import Timings
from visprune.eval.speed.memory import Peak
from visprune.machine.run import prune


@pytest.fixture(scope="module")
def model() -> Any:
    return ideal.build("quick")


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, torch.Tensor]:
    return prompt(model, "quick")


@pytest.mark.parametrize("label", METHODS)
def test_every_method_gives_its_ideals_logits(
    model: Any, inputs: dict[str, torch.Tensor], label: str
) -> None:
    pair = pair_up(model, inputs, label, 48)
    assert pair.error <= 1e-5
    visual = {"fastv": 144, "pool": 6 * 7}.get(label, 48)
    assert pair.ideal.embeds.shape[1] == 40 + visual


@pytest.mark.parametrize("label", ["divprune", "fastv"])
def test_a_batch_has_an_ideal_too(model: Any, label: str) -> None:
    assert pair_up(model, prompt(model, "quick", batch=3), label, 20).error <= 1e-5


def test_a_withdrawal_is_in_the_ideal(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    pair = pair_up(model, inputs, "todre", 48, tau=2.0)
    assert {layer: index.shape[1] for layer, index in pair.ideal.drops.items()} == {7: 40}
    assert pair.error <= 1e-5


@torch.inference_mode()
def test_other_tokens_or_positions_are_told_apart(
    model: Any, inputs: dict[str, torch.Tensor]
) -> None:
    """What the benchmark compares would notice a method that keeps or places tokens wrongly."""
    with prune(model, get_method("todre", num_keep=48, stage2=False)) as run:
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    selection = run.trace.whole(0)
    assert selection is not None
    agree(logits, ideal_of(model, inputs, run.trace, selection)(), "the same tokens")
    wrong = ideal_of(model, inputs, run.trace, Selection(143 - selection.index.flip(1), 144))
    with pytest.raises(VispruneError, match="other tokens: its logits differ"):
        agree(logits, wrong(), "other tokens")
    run.trace.positions = "compact"
    with pytest.raises(VispruneError, match="No times are given for wrong answers"):
        agree(logits, ideal_of(model, inputs, run.trace, selection)(), "other positions")


def test_nan_is_no_agreement() -> None:
    with pytest.raises(VispruneError, match="nan"):
        agree(torch.tensor([float("nan")]), torch.tensor([1.0]), "nothing")


def test_no_time_is_printed_for_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    honest = ideal.Ideal.__call__
    monkeypatch.setattr(ideal.Ideal, "__call__", lambda self, turn=0: honest(self) * 1.01)
    with pytest.raises(VispruneError, match="differ from the ideal's"):
        bench_prefill.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["visprune", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code


def test_prefill_writes_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--quick", "--threads", "1", "--methods", "random", "fastv", "--out", str(tmp_path))
    _run(monkeypatch, "bench", "prefill", *options)
    out = capsys.readouterr().out
    assert "share" in out
    assert "checked before timing" in out
    record = json.loads((tmp_path / "prefill.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in record["rows"]] == ["random", "fastv"]
    assert record["threads"] == 1
    assert record["command"].startswith("visprune bench prefill --quick")
    for row in record["rows"]:
        assert all(row[key] > 0 for key in ("speedup", "ideal_speedup", "share", "method_ms"))
    with (tmp_path / "prefill.csv").open(encoding="utf-8") as file:
        assert [float(line["share"]) for line in csv.DictReader(file)] == [
            row["share"] for row in record["rows"]
        ]


def test_decode_writes_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _run(monkeypatch, "bench", "decode", "--quick", "--threads", "1", "--out", str(tmp_path))
    record = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))
    (row,) = record["rows"]
    assert (row["method"], row["num_keep"], row["new_tokens"]) == ("todre stage 1", 48, 12)
    assert row["dense_ms_per_token"] > 0


def test_decode_refuses_a_time_that_is_not_above_zero() -> None:
    names = ("random 8", "ideal random 8", "dense")
    held_up = {"dense first": [0.1, 9.0]}
    seconds = {name: [0.4, 0.4] for name in names} | {f"{name} first": [0.1] * 2 for name in names}
    with pytest.raises(VispruneError, match=r"in the median of 2 rounds.*more --rounds"):
        bench_decode._row("random", 8, Timings(seconds | held_up), 4)
    row = bench_decode._row("random", 8, Timings(seconds), 4)
    assert row["dense_ms_per_token"] == pytest.approx(100.0)


def test_decode_compares_generated_tokens_first(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = bench_decode.ideal_of

    def off_by_one(*args: Any) -> Any:
        made = honest(*args)
        made.embeds = made.embeds.roll(1, dims=1)
        return made

    monkeypatch.setattr(bench_decode, "ideal_of", off_by_one)
    with pytest.raises(VispruneError, match="generated token 0"):
        bench_decode.measure(model, "quick", ["random"], [48], new_tokens=2, rounds=1)


def test_decode_refuses_what_has_no_short_sequence(model: Any) -> None:
    with pytest.raises(ConfigError, match="fastv drops tokens inside the decoder"):
        bench_decode.measure(model, "quick", ["fastv"], [48], new_tokens=2, rounds=1)
    with pytest.raises(ConfigError, match="at least two new tokens, got 1"):
        bench_decode.measure(model, "quick", ["random"], [48], new_tokens=1, rounds=1)


def test_the_shape_of_the_benchmark_is_the_stated_one() -> None:
    small = ideal.SHAPES["small"]
    assert small.visual_tokens == 576
    assert (small.vision[:2], small.text, small.text_tokens) == (
        (256, 6), (1024, 12, 16, 2752), 40,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="Did you mean 'small'"):
        ideal.build("smal")


def test_the_models_inputs_have_the_stated_length(model: Any) -> None:
    inputs = prompt(model, "quick", batch=2)
    assert inputs["input_ids"].shape == (2, 144 + 40)
    assert torch.equal(inputs["input_ids"], prompt(model, "quick", batch=2)["input_ids"])


def test_rates_of_the_evaluator_are_of_equal_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["--limit", "3", "--batches", "1", "2", "--rounds", "1", "--threads", "1"]
    _run(monkeypatch, "bench", "eval", *words, "--out", str(tmp_path))
    record = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in record["rows"]] == ["a plain loop", "batch 1", "batch 2"]
    assert all(row["answers"] == 3 * 5 and row["rate"] > 0 for row in record["rows"])

    def other(model: Any, study: Any) -> Any:
        return {key: text + "!" for key, text in bench_eval._loop(model, study).items()}

    monkeypatch.setattr(bench_eval, "_run", other)
    with pytest.raises(VispruneError, match=r"answer 15 questions differently.*; no rates"):
        bench_eval.measure(3, [1], rounds=1)


def test_what_choosing_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["todre", "v2drop", "sparsevlm", "evit"]
    bench_methods.main(["--quick", "--methods", *names, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in record["rows"]] == names
    for row in record["rows"]:
        assert row["method"] in said
        assert row["selection_ms"] > 0.0
        assert row["share"] == pytest.approx(row["selection_ms"] / row["prefill_ms"])
        assert (row["tokens"], row["batch"]) == (144, 2)
    assert "logits" not in said  # nothing of the kind was checked
    for wrong in ("snapkv", "todr"):
        with pytest.raises(ConfigError, match=f"'{wrong}' chooses nothing in a prefill"):
            bench_methods.main(["--quick", "--methods", wrong, "--out", str(tmp_path)])


def test_what_long_prompts_take_at_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["snapkv", "adakv", "kvquant"]
    bench_cache.main(["--quick", "--methods", *names, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "cache.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["none", *names] * 2
    assert [row["prompt"] for row in rows[::4]] == ["picture", "clip"]
    assert [row["tokens"] for row in rows[::4]] == [184, 53]
    for row in rows:
        assert row["method"] in said
        assert row["ms_per_token"] > 0.0
    # A tenth of 144 slots and 40 of text, of 184; whole at first.
    dense, even, ragged, codes = rows[:4]
    assert (dense["cache_share"], dense["form"]) == (1.0, "whole")
    assert even["cache_share"] == pytest.approx((40 + 14) / 184)
    assert (even["form"], codes["form"]) == ("even", "ragged+4 bit")
    assert ragged["form"].startswith("ragged")  # heads of a layer may happen to keep as many
    assert codes["allocated_bytes"] > codes["cache_bytes"]  # room to grow
    with pytest.raises(ConfigError, match="'fastv' does not act at the cache"):
        bench_cache.main(["--quick", "--methods", "fastv", "--out", str(tmp_path)])


def test_the_peak_of_memory_is_what_was_held_on_top() -> None:
    peak = Peak("cpu")
    if peak.nbytes is None:
        pytest.skip("the system does not tell")
    held = torch.ones(64, 2**20)  # 256 MiB
    del held
    assert peak.nbytes > 200 * 2**20
    assert Peak("cpu").nbytes < 64 * 2**20  # type: ignore[operator]


def test_decode_over_caches_says_what_was_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick", "--threads", "1", "--out", str(tmp_path)]
    _run(monkeypatch, "bench", "decode", "--methods", "snapkv", "adakv", *options)
    rows = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["snapkv (even)", "adakv (ragged)"]
    assert all(row["share"] > 0 for row in rows)
    said = " ".join(capsys.readouterr().out.split())
    assert "the ideal's slots are random numbers" in said
    assert "Same logits as the ideal" not in said
