# SPDX-License-Identifier: Apache-2.0
"""Shapes read from configs, and input that cannot be priced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.cost_configs import (
    clip_vision_shape,
    decoder_shape,
    llava_projector_shape,
    qwen2_5_vl_vision_shape,
)
from visprune.cost.cost import (
    Cost,
    Decoder,
    DecoderLayer,
    DecoderShape,
    Encoder,
    EncoderLayer,
    ModelShape,
    Projector,
    ProjectorShape,
    VisionShape,
    decode_macs,
    encoder_macs,
    kv_bytes,
    lm_head_macs,
    mean_tokens,
    prefill_macs,
    projected_tokens,
    sample_cost,
    vision_macs,
)
from visprune.errors import ConfigError, UnsupportedModel

DECODER = DecoderShape(4, 32, 4, 2, 12, 56, 99)
CLIP = VisionShape(3, 24, 2, 12, 40, 147, has_cls=True)
MODEL = ModelShape(DECODER, CLIP, ProjectorShape(((24, 32), (32, 32))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prefill_macs(DECODER, -1), r"tokens_per_layer .* at least 0, got -1"),
        (lambda: prefill_macs(DECODER, [3, 2.5, 2, 1]), r"whole number.*got 2\.5.*averages"),
        (lambda: prefill_macs(DECODER, [True] * 4), r"got True"),
        (lambda: prefill_macs(DECODER, [3, 2, 1]), r"each of the 4 layers, got 3"),
        (lambda: prefill_macs(DECODER, 3, cached=[1]), r"cached needs one count .* got 1"),
        (
            lambda: prefill_macs(DECODER, 3, causal="idea"),
            r"'dense', got 'idea'.*mean 'ideal'",
        ),
        (lambda: decode_macs(DECODER, 3, steps=-2), r"steps .* got -2"),
        (lambda: decode_macs(DECODER, [1] * 5), r"4 layers, got 5"),
        (lambda: lm_head_macs(DECODER, -1), r"rows .* got -1"),
        (lambda: kv_bytes(DECODER, [1], 2), r"stored_per_layer needs one count"),
        (lambda: kv_bytes(DECODER, 1, 0), r"bytes of one element .* at least 1, got 0"),
        (lambda: vision_macs(CLIP, [(4, 4)]), r"\(frames, rows, columns\).*got \[4, 4\]"),
        (lambda: vision_macs(CLIP, [(1, 0, 4)]), r"at least 1, got 0"),
        (lambda: encoder_macs(CLIP, [1, 2]), r"3 layers, got 2"),
        (lambda: encoder_macs(CLIP, 2, patches=-1), r"patches .* got -1"),
        (
            lambda: encoder_macs(VisionShape(1, 8, 1, 8, 8, 1, window=2, windowed_layers=(0,)), 4),
            r"use vision_macs for windows",
        ),
        (
            lambda: projected_tokens(ProjectorShape(((4, 4),), merge=2), [(1, 4, 5)]),
            r"4 by 5 patches cannot be cut .* multiples of 2",
        ),
        (lambda: vision_macs(CLIP, [(1, 4, 4)], [(16, 9)]), r"counts .* 3 layers, got 1"),
        (
            lambda: vision_macs(
                VisionShape(1, 8, 1, 8, 8, 1, window=2, windowed_layers=(0,)), [(1, 4, 4)], [(9, 9)]
            ),
            r"windows are counted for whole frames only",
        ),
        (lambda: DecoderLayer(token=-1), r"DecoderLayer\.token .* got -1"),
        (lambda: DecoderLayer(token=1, window=0), r"DecoderLayer\.window .* at least 1, got 0"),
        (lambda: Decoder(layers=(), head=1), r"Decoder\.layers is empty"),
        (lambda: EncoderLayer(1, 2, 0.5), r"EncoderLayer\.pair .* got 0\.5"),  # type: ignore[arg-type]
        (
            lambda: Encoder((EncoderLayer(1, 1, 1, window=4),), patch=1, prefix=1),
            r"windows need prefix=0, got prefix=1",
        ),
        (lambda: Projector(3, merge=0), r"Projector\.merge .* at least 1, got 0"),
        (lambda: mean_tokens([]), r"one count per layer"),
        (lambda: Cost(selection=-5), r"Cost\.selection .* got -5"),
        (lambda: Cost(samples=0).per_sample(), r"no samples"),
        (lambda: sample_cost(MODEL, tokens_per_layer=1, decode_steps=-1, dtype=2), r"decode_steps"),
        (lambda: replace(DECODER, num_kv_heads=3), r"divide num_heads, got 3 and 4"),
        (lambda: replace(DECODER, head_dim=0), r"DecoderShape\.head_dim .* at least 1, got 0"),
        (lambda: replace(DECODER, windows=(4,)), r"one entry per layer \(4\)"),
        (lambda: replace(DECODER, windows=(4, 0, 4, 4)), r"DecoderShape\.windows .* got 0"),
        (lambda: replace(CLIP, windowed_layers=(0,)), r"window=None, has_cls=True"),
        (lambda: replace(CLIP, window=0), r"VisionShape\.window .* got 0"),
        (
            lambda: VisionShape(2, 8, 1, 8, 8, 1, window=2, windowed_layers=(1, 2)),
            r"names \[2\], but layers are 0 to 1",
        ),
        (lambda: ProjectorShape(((0, 4),)), r"ProjectorShape\.layers .* got 0"),
    ],
)
def test_bad_input_says_what_was_wrong(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def _text(**changes: Any) -> SimpleNamespace:
    sizes = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    return SimpleNamespace(**{**sizes, **changes})


def test_decoder_shape_falls_back_to_one_kv_head_per_head() -> None:
    assert decoder_shape(_text()) == DecoderShape(4, 32, 4, 4, 8, 56, 99)


def test_decoder_shape_reads_windows() -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    per_layer = _text(layer_types=kinds, sliding_window=16)
    assert decoder_shape(per_layer).windows == (None, None, 16, 16)
    assert decoder_shape(_text(sliding_window=16)).windows == (16,) * 4
    assert decoder_shape(_text(sliding_window=16, use_sliding_window=False)).windows == ()
    assert decoder_shape(_text(layer_types=["full_attention"] * 4, sliding_window=16)).windows == ()


def test_decoder_shape_does_not_guess_the_mlp() -> None:
    with pytest.raises(ConfigError, match=r"'opt' has two or three matrices.*gated_mlp=True"):
        decoder_shape(_text(model_type="opt"))
    assert decoder_shape(_text(model_type="opt"), gated_mlp=False).gated_mlp is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "linear_attention layers"),
    ],
)
def test_decoders_that_we_cannot_count_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        decoder_shape(_text(**changes))


def test_other_towers_are_not_taken_for_clip() -> None:
    with pytest.raises(UnsupportedModel, match="'siglip_vision_model' is not a CLIP"):
        clip_vision_shape(SimpleNamespace(model_type="siglip_vision_model"))


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ConfigError, match="SimpleNamespace has no vocab_size"):
        decoder_shape(_text(vocab_size=None))
    with pytest.raises(ConfigError, match="has no vision_feature_layer"):
        llava_projector_shape(SimpleNamespace())


def test_qwen2_5_vl_published_window_is_eight_patches() -> None:
    config = SimpleNamespace(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    shape = qwen2_5_vl_vision_shape(config)
    assert shape.window == 8
    assert shape.patch_dim == 3 * 2 * 14 * 14
    assert set(range(32)) - set(shape.windowed_layers) == {7, 15, 23, 31}
