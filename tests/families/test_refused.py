# SPDX-License-Identifier: Apache-2.0
"""Families that were looked at and left out: refused before any work, with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers as tf
from torch import nn

import visprune
from tests.families.tiny.parts import noise, text, vit
from visprune.backbones.vlm import REFUSED, TABLE
from visprune.errors import UnsupportedModel


class Named(nn.Module):
    """A model of a family, by its name alone; all else of it would raise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=kind)


def test_no_family_is_claimed_and_refused() -> None:
    assert not set(TABLE) & set(REFUSED)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_the_reason_is_told(kind: str) -> None:
    with pytest.raises(UnsupportedModel) as told:
        visprune.prune(Named(kind), "random", num_keep=3)
    assert f"({kind}) is not pruned: {REFUSED[kind]}. Families with an adapter: " in str(told.value)


def _florence2() -> Any:
    config = tf.Florence2Config(
        vision_config={
            "embed_dim": [8, 8, 8, 8],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "depths": [1, 1, 1, 1],
            "projection_dim": 32,
            "window_size": 4,
        },
        text_config={
            "model_type": "bart", "vocab_size": 100, "d_model": 32, "encoder_layers": 1,
            "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        },
        image_token_id=90,
    )  # fmt: skip
    return tf.Florence2ForConditionalGeneration(config)


def _mllama() -> Any:
    kinds = tf.models.mllama.configuration_mllama
    decoder = text(4, cross_attention_layers=[1])
    decoder.pop("head_dim")
    config = tf.MllamaConfig(
        text_config=kinds.MllamaTextConfig(**decoder),
        vision_config=kinds.MllamaVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1,
            attention_heads=2, image_size=24, patch_size=4, max_num_tiles=2,
            vision_output_dim=32, intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        image_token_index=90,
    )  # fmt: skip
    return tf.MllamaForConditionalGeneration(config)


def _blip2() -> Any:
    config = tf.Blip2Config(
        vision_config=vit(),
        qformer_config={
            "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "encoder_hidden_size": 24,
        },
        text_config=tf.OPTConfig(
            vocab_size=100, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=32,
        ),
        num_query_tokens=4,
        image_token_index=90,
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [_florence2, _mllama, _blip2], ids=lambda make: make.__name__)
def test_real_models_are_refused_as_they_were(make: Any) -> None:
    model = make().eval()
    before = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    kind = model.config.model_type
    with pytest.raises(UnsupportedModel, match=r"is not pruned: "):
        visprune.prune(model, "random", num_keep=3)
    with pytest.raises(UnsupportedModel, match=r"is not pruned: "):
        visprune.check(model, {"pixel_values": noise("a", 1, 3, 24, 24)})
    assert kind in REFUSED
    after = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    assert after == before
