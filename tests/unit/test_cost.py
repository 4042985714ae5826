# SPDX-License-Identifier: Apache-2.0
"""What the cost of a run promises, apart from golden numbers and the counter."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visprune.cost.cost import (
    PARTS,
    Cost,
    Decoder,
    DecoderLayer,
    DecoderShape,
    Encoder,
    EncoderLayer,
    ModelShape,
    ProjectorShape,
    VisionShape,
    decode_macs,
    encoder_macs,
    kv_bytes,
    lm_head_macs,
    prefill_macs,
    sample_cost,
    visible_pairs,
    vision_macs,
)

DECODER = DecoderShape(
    num_layers=4,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    ffn_size=56,
    vocab_size=99,
)
CLIP = VisionShape(3, 24, 2, 12, 40, 147, has_cls=True)
MODEL = ModelShape(DECODER, CLIP, ProjectorShape(((24, 32), (32, 32))))
COUNTS = st.lists(st.integers(0, 40), min_size=4, max_size=4)


def _allowed(tokens: int, cached: int, window: int | None) -> int:
    """Count a causal mask's open cells one by one."""
    return sum(
        1
        for query in range(cached, cached + tokens)
        for key in range(query + 1)
        if window is None or query - key < window
    )


@given(
    tokens=st.integers(0, 20),
    cached=st.integers(0, 20),
    window=st.one_of(st.none(), st.integers(1, 25)),
)
def test_pairs_are_the_open_cells_of_the_mask(tokens: int, cached: int, window: int | None) -> None:
    assert visible_pairs(tokens, cached, window=window) == _allowed(tokens, cached, window)
    assert visible_pairs(tokens, cached, causal="dense", window=window) == tokens * (
        cached + tokens
    )


@given(tokens=COUNTS, cached=COUNTS)
def test_a_prefill_in_two_turns_costs_what_one_costs(tokens: list[int], cached: list[int]) -> None:
    both = [old + new for old, new in zip(cached, tokens, strict=True)]
    two = prefill_macs(DECODER, cached) + prefill_macs(DECODER, tokens, cached=cached)
    assert prefill_macs(DECODER, both) == two


@given(stored=COUNTS, first=st.integers(0, 9), second=st.integers(0, 9))
def test_decode_steps_add_up_and_each_is_a_prefill_of_one(
    stored: list[int], first: int, second: int
) -> None:
    later = [count + first for count in stored]
    whole = decode_macs(DECODER, stored, first + second)
    assert whole == decode_macs(DECODER, stored, first) + decode_macs(DECODER, later, second)
    for causal in ("ideal", "dense"):
        one = prefill_macs(DECODER, 1, cached=stored, causal=causal)  # type: ignore[arg-type]
        assert decode_macs(DECODER, stored) == one


@given(tokens=COUNTS, layer=st.integers(0, 3), more=st.integers(1, 9))
def test_more_tokens_cost_more(tokens: list[int], layer: int, more: int) -> None:
    grown = list(tokens)
    grown[layer] += more
    assert prefill_macs(DECODER, grown) > prefill_macs(DECODER, tokens)
    assert decode_macs(DECODER, grown) > decode_macs(DECODER, tokens)
    assert kv_bytes(DECODER, grown, 2) > kv_bytes(DECODER, tokens, 2)
    assert encoder_macs(replace(CLIP, num_layers=4), grown) > encoder_macs(
        replace(CLIP, num_layers=4), tokens
    )


@given(tokens=COUNTS)
def test_dense_is_never_less_than_ideal(tokens: list[int]) -> None:
    ideal, dense = prefill_macs(DECODER, tokens), prefill_macs(DECODER, tokens, causal="dense")
    pairs = sum(n * (n - 1) // 2 for n in tokens)
    assert dense - ideal == 2 * DECODER.query_size * pairs


def test_one_layer_by_hand() -> None:
    shape = replace(DECODER, num_layers=1)
    by_hand = 7 * 32 * (48 + 2 * 24) + 7 * 48 * 32 + 2 * 48 * 28 + 3 * 7 * 32 * 56
    assert prefill_macs(shape, 7) == by_hand
    ungated = replace(shape, gated_mlp=False)
    assert prefill_macs(ungated, 7) == by_hand - 7 * 32 * 56


@pytest.mark.parametrize("counts", [torch.tensor([3, 4, 5, 6]), (n for n in (3, 4, 5, 6))])
def test_counts_may_be_a_tensor_or_a_generator(counts: Any) -> None:
    assert prefill_macs(DECODER, counts) == prefill_macs(DECODER, [3, 4, 5, 6])


@pytest.mark.parametrize("count", [5, torch.tensor(5)])
def test_one_count_stands_for_every_layer(count: Any) -> None:
    assert prefill_macs(DECODER, count) == prefill_macs(DECODER, [5, 5, 5, 5])


def test_a_window_longer_than_the_prompt_changes_nothing() -> None:
    windowed = replace(DECODER, windows=(8, None, 8, None))
    assert prefill_macs(windowed, 8) == prefill_macs(DECODER, 8)
    assert prefill_macs(windowed, 10) == prefill_macs(DECODER, 10) - 2 * 2 * 48 * (1 + 2)
    assert decode_macs(windowed, 20) == decode_macs(DECODER, 20) - 2 * 2 * 48 * (21 - 8)


def test_a_pruned_tower_that_loses_nothing_is_the_whole_tower() -> None:
    assert encoder_macs(CLIP, 17, patches=16) == vision_macs(CLIP, [(1, 4, 4)])


@given(h=st.integers(1, 12), w=st.integers(1, 12), side=st.integers(1, 12))
def test_windows_tile_the_picture(h: int, w: int, side: int) -> None:
    plain = VisionShape(1, 8, 1, 8, 1, 1)
    windowed = replace(plain, window=side, windowed_layers=(0,))
    pairs = 0
    for top in range(0, h, side):
        for left in range(0, w, side):
            pairs += (min(side, h - top) * min(side, w - left)) ** 2
    saved = vision_macs(plain, [(1, h, w)]) - vision_macs(windowed, [(1, h, w)])
    assert saved == 2 * 8 * ((h * w) ** 2 - pairs)


def test_latents_are_unfolded_in_every_call_and_states_do_not_grow() -> None:
    decoder = Decoder(
        (DecoderLayer(token=100, pair=10, key=7, cache=5), DecoderLayer(token=50, state=9)), head=3
    )
    assert prefill_macs(decoder, 4) == 4 * 100 + 10 * 10 + 4 * 7 + 4 * 50
    # Two steps over 4 stored tokens read 5 and 6 keys.
    assert decode_macs(decoder, 4, 2) == 2 * 100 + 10 * (5 + 6) + 7 * (5 + 6) + 2 * 50
    assert prefill_macs(decoder, [0, 0], cached=4) == 0
    assert kv_bytes(decoder, 6, 2) == 2 * (6 * 5 + 9)


def test_an_encoder_that_loses_patches_inside() -> None:
    layers = (EncoderLayer(attention=20, mlp=30, pair=2), EncoderLayer(40, 60, 4))
    encoder = Encoder(layers, patch=7, prefix=1, pooled=11, pooled_token=5)
    counts = [(16, 9), (9, 4)]
    first = 17 * 20 + 17 * 17 * 2 + 10 * 30
    second = 10 * 40 + 10 * 10 * 4 + 5 * 60
    frame = 16 * 7 + first + second + 11 + 5 * 5
    assert vision_macs(encoder, [(1, 4, 4)] * 3, counts) == 3 * frame
    assert vision_macs(encoder, [(1, 4, 4)], [(16, 16)] * 2) == vision_macs(encoder, [(1, 4, 4)])


def test_kv_bytes_of_llava_are_half_a_mebibyte_a_token() -> None:
    shape = DecoderShape(32, 4096, 32, 32, 128, 11008, 32000)
    assert kv_bytes(shape, 576, torch.float16) == 288 * 2**20
    assert kv_bytes(shape, 576, torch.float32) == 576 * 2**20
    assert kv_bytes(replace(shape, num_kv_heads=8), 576, torch.bfloat16) == 72 * 2**20


def test_a_sample_is_the_sum_of_its_parts() -> None:
    tokens = [40, 40, 20, 12]
    cost = sample_cost(
        MODEL,
        tokens_per_layer=tokens,
        grids=[(1, 4, 4), (1, 4, 4)],
        cached=[5, 5, 3, 3],
        decode_steps=6,
        selection=1234,
        dtype=torch.bfloat16,
    )
    stored = [45, 45, 23, 15]
    assert cost.vision == vision_macs(CLIP, [(1, 4, 4)] * 2)
    assert cost.projector == 32 * (24 * 32 + 32 * 32)
    assert cost.prefill == prefill_macs(DECODER, tokens, cached=[5, 5, 3, 3])
    assert cost.decode == decode_macs(DECODER, stored, 6)
    assert cost.lm_head == lm_head_macs(DECODER, 1 + 6)
    assert cost.selection == 1234
    assert cost.kv_bytes == 2 * sum(stored) * 24 * 2
    assert cost.macs == sum(cost.parts.values())
    assert cost.flops == 2 * cost.macs
    assert tuple(cost.parts) == PARTS


def test_an_evicted_cache_is_read_where_it_is_given() -> None:
    kept = sample_cost(MODEL, tokens_per_layer=40, dtype=2, decode_steps=3)
    evicted = sample_cost(MODEL, tokens_per_layer=40, stored_per_layer=8, dtype=2, decode_steps=3)
    assert evicted.prefill == kept.prefill
    assert evicted.decode == decode_macs(DECODER, 8, 3) < kept.decode
    assert evicted.kv_bytes * 5 == kept.kv_bytes


def test_pruning_before_the_projector_shows_in_its_part_only() -> None:
    whole = sample_cost(MODEL, tokens_per_layer=9, grids=[(1, 4, 4)], dtype=2)
    half = sample_cost(MODEL, tokens_per_layer=9, grids=[(1, 4, 4)], projected=8, dtype=2)
    assert half.projector * 2 == whole.projector
    assert replace(half, projector=whole.projector) == whole


def test_costs_of_samples_add() -> None:
    one = sample_cost(MODEL, tokens_per_layer=9, grids=[(1, 4, 4)], dtype=2)
    two = sample_cost(MODEL, tokens_per_layer=30, decode_steps=2, dtype=2)
    batch = sum([one, two, two])
    assert isinstance(batch, Cost)
    assert batch.samples == 3
    assert batch.macs == one.macs + 2 * two.macs
    assert batch.kv_bytes == one.kv_bytes + 2 * two.kv_bytes
    assert batch == one + (two + two)
    mean = batch.per_sample()
    assert mean["flops"] == pytest.approx(batch.flops / 3)
    assert sum(mean[part] for part in PARTS) == pytest.approx(mean["macs"])
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]


def test_to_dict_survives_json_also_from_tensor_counts() -> None:
    cost = Cost(vision=torch.tensor(7), kv_bytes=12)  # type: ignore[arg-type]
    read = json.loads(json.dumps(cost.to_dict()))
    assert read["macs"] == 7
    assert read["flops"] == 14
    assert read["parts"] == {**dict.fromkeys(PARTS, 0), "vision": 7}
    assert read["kv_bytes"] == 12


def test_table_names_every_part_and_the_total() -> None:
    cost = Cost(vision=2_000_000_000, prefill=6_000_000_000, kv_bytes=3 * 2**20)
    lines = (cost + cost).table().splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [*PARTS, "total"]
    assert lines[1].split() == ["vision", "2.0000", "4.0000", "25.0%"]
    assert lines[-2].split() == ["total", "8.0000", "16.0000", "100.0%"]
    assert lines[-1] == "KV cache after prefill: 3.000 MiB, mean of 2 samples"
    assert "mean of" not in cost.table()
    assert "0.0%" in Cost().table()
