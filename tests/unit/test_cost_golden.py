# SPDX-License-Identifier: Apache-2.0
"""Published operation counts, recomputed from token counts to the digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visprune.cost.cost import DecoderShape, VisionShape, encoder_macs, mean_tokens, prefill_macs
from visprune.cost.presets import LLAVA_1_5_7B, calflops, fastv, pyramiddrop
from visprune.errors import ConfigError

_FILE = Path(__file__).parents[1] / "golden" / "flops" / "cases.json"
CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in json.loads(_FILE.read_text(encoding="utf-8"))["cases"]
}
PRESETS = {"fastv": fastv, "pdrop": pyramiddrop}


def _of(*families: str) -> list[str]:
    return [name for name, case in CASES.items() if case["family"] in families]


def _uniform(case: dict[str, Any]) -> int:
    layers = 1 if "_layer_" in case["id"] else case["inputs"]["layers"]
    return PRESETS[case["family"]]([_tokens(case)] * layers)


def _tokens(case: dict[str, Any]) -> int:
    # Some one-layer cases keep the n of their family in `inputs`; the id names their own.
    return int(case["id"].rpartition("_n")[2])


UNIFORM = [name for name in _of("fastv", "pdrop") if "_n" in name and "_ratio_" not in name]


def test_every_decoder_case_is_tested() -> None:
    special = {
        "fastv_ratio_K3_R50_n576",
        "fastv_ratio_K2_R50_n612",
        "pdrop_lambda05_S4",
        "avg_tokens_fastv_K2_keep144",
        "avg_tokens_pdrop",
    }
    assert set(UNIFORM) | special == set(_of("fastv", "pdrop"))


@pytest.mark.parametrize("name", UNIFORM)
def test_same_tokens_in_every_layer(name: str) -> None:
    case = CASES[name]
    assert _uniform(case) == case["value"]
    if case["published"] is not None:
        assert _uniform(case) == pytest.approx(case["published"], rel=1e-3)


@pytest.mark.parametrize("name", ["fastv_ratio_K3_R50_n576", "fastv_ratio_K2_R50_n612"])
def test_fastv_ratio(name: str) -> None:
    inputs = CASES[name]["inputs"]
    n, k, layers = inputs["n"], inputs["K"], inputs["layers"]
    kept = n - int(inputs["R"] * 576)
    ratio = fastv([n] * k + [kept] * (layers - k)) / fastv([n] * layers)
    assert ratio == pytest.approx(CASES[name]["value"], rel=1e-9)


def test_fastv_published_layer_is_99_3_billion() -> None:
    assert round(fastv([612]) / 1e9, 1) == 99.3


def test_pyramiddrop_published_stages() -> None:
    stages = [tokens for tokens in (576, 288, 144, 72) for _ in range(8)]
    assert pyramiddrop(stages) == CASES["pdrop_lambda05_S4"]["value"]
    assert round(pyramiddrop(stages) / 1e12, 2) == 1.78
    assert round(pyramiddrop([576] * 32) / 1e12, 2) == 3.82
    assert mean_tokens(stages) == CASES["avg_tokens_pdrop"]["value"]


def test_average_tokens_of_fastv_are_not_those_it_keeps() -> None:
    assert mean_tokens([576] * 2 + [144] * 30) == CASES["avg_tokens_fastv_K2_keep144"]["value"]


@pytest.mark.parametrize("tokens", [1, 64, 612])
def test_pyramiddrop_is_our_dense_count_where_every_head_has_its_own_keys(tokens: int) -> None:
    assert pyramiddrop([tokens] * 32) == prefill_macs(LLAVA_1_5_7B, tokens, causal="dense")


def test_published_formulas_count_too_much_where_heads_share_keys() -> None:
    # Qwen2.5-VL-7B has 28 query heads and 4 key heads: about 9 % too much.
    qwen = DecoderShape(28, 3584, 28, 4, 128, 18944, 152064)
    naive = pyramiddrop([1000] * 28, hidden_size=3584, ffn_size=18944)
    assert 1.08 < naive / prefill_macs(qwen, 1000, causal="dense") < 1.10


def _llama(vocab_size: int) -> DecoderShape:
    return DecoderShape(32, 4096, 32, 32, 128, 11008, vocab_size)


@pytest.mark.parametrize(
    ("vocab_size", "gflops", "gmacs"),
    # calflops' own table, 128 tokens: llama-7b, chinese-llama-7b, baichuan-7B.
    [(32000, 1700.06, 850.00), (49953, 1718.89, 859.41), (64000, 1733.62, 866.78)],
)
def test_calflops_published_table(vocab_size: int, gflops: float, gmacs: float) -> None:
    count = calflops(_llama(vocab_size), 128)
    assert round(count.flops / 1e9, 2) == gflops
    assert round(count.macs / 1e9, 2) == gmacs


def test_calflops_of_vtw() -> None:
    assert round(calflops(LLAVA_1_5_7B, 626).flops / 1e12, 2) == 8.48


def test_calflops_as_the_tool_printed_it() -> None:
    # Printed by calflops 0.3.2 for a random LlamaForCausalLM of this shape and 23 tokens.
    shape = DecoderShape(3, 32, 4, 2, 8, 56, 99)
    eager, sdpa = calflops(shape, 23), calflops(shape, 23, attention="sdpa")
    assert (eager.flops, eager.macs) == (1524900, 757344)
    assert (sdpa.flops, sdpa.macs) == (1315416, 655776)


def test_calflops_refuses_another_attention() -> None:
    with pytest.raises(ConfigError, match=r"'eager' or 'sdpa'.*Did you mean 'eager'"):
        calflops(LLAVA_1_5_7B, 5, attention="eagr")  # type: ignore[arg-type]


def _vit(width: int, blocks: int = 12, patch: int = 16) -> VisionShape:
    return VisionShape(
        num_layers=blocks,
        hidden_size=width,
        num_heads=width // 64,
        head_dim=64,
        ffn_size=4 * width,
        patch_dim=3 * patch * patch,
        has_cls=True,
    )


VITS = [n for n in _of("deit", "evit", "tome", "dynamicvit") if not n.endswith("_with_predictor")]


@pytest.mark.parametrize("name", VITS)
def test_pruned_vits(name: str) -> None:
    inputs, width = CASES[name]["inputs"], CASES[name]["inputs"]["C"]
    blocks = inputs.get("blocks", 12)
    attention = inputs.get("tokens_attn", inputs.get("tokens", [197] * blocks))
    macs = encoder_macs(
        _vit(width, blocks), attention, inputs.get("tokens_mlp", attention), patches=196
    )
    assert macs + 1000 * width == CASES[name]["value"]


@pytest.mark.parametrize("name", _of("diffrate"))
def test_diffrate_schedules(name: str) -> None:
    inputs = CASES[name]["inputs"]
    width, blocks, patch = inputs["C"], inputs["blocks"], inputs["patch"]
    first = (224 // patch) ** 2 + 1
    attention, entering = [], first
    for pruned, merged in zip(inputs["prune_kept"], inputs["merge_kept"], strict=True):
        attention.append(entering)
        entering = min(entering, pruned, merged)
    mlp = [*attention[1:], entering]
    macs = encoder_macs(_vit(width, blocks, patch), attention, mlp, patches=first - 1)
    assert macs + 1000 * width == CASES[name]["value"]
