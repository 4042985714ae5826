# SPDX-License-Identifier: Apache-2.0
"""Families that were looked at and left out: refused before any work, with the reason."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import visprune
from tests.families.tiny.parts import noise, text, vit
from visprune.backbones.hf.features import encoder_output
from visprune.backbones.storage import read_model
from visprune.backbones.vlm import REFUSED, TABLE, known
from visprune.errors import ConfigError, UnsupportedModel
from visprune.eval.models.base import ModelEntry
from visprune.eval.models.load_vlm import load
from visprune.machine.find import find_adapter


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


def test_what_an_older_transformers_lacks_is_refused_with_the_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(known, "installed", lambda: "5.6.2")
    assert set(known.SINCE) <= set(known.KNOWN)
    needs = {row.name: row.needs for row in visprune.list_models("vlm")}
    assert needs["kimi_k25"] == "transformers 5.13"
    assert not needs["qwen3_vl"]
    why = re.escape("it needs transformers 5.13 or later, and 5.6.2 is installed (pip install -U")
    with pytest.raises(UnsupportedModel, match=why):
        visprune.prune(Named("kimi_k25"), "random", num_keep=3)
    # As it is there: transformers knows no such model.
    fields = {"model_type": "kimi_k25", "architectures": ["None"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for read in (read_model, lambda folder: load(ModelEntry(name=str(folder)))):
        with pytest.raises(ConfigError, match=why):
            read(tmp_path)


def test_tokens_in_one_line_are_told_apart_by_grids(models: Any) -> None:
    # paddleocr_vl before transformers 5.7, among others.
    adapter = find_adapter(models("paddleocr_vl"))
    call = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 8]])}
    features = [torch.ones(6, 32), torch.ones(8, 32)]
    wanted = adapter.pieces(call, "image", encoder_output(features))
    made = adapter.pieces(call, "image", SimpleNamespace(pooler_output=torch.ones(14, 32)))
    for (one,), (other,) in zip(made, wanted, strict=True):
        assert torch.equal(one.pos, other.pos)
    with pytest.raises(UnsupportedModel, match="all 15 tokens in one line"):
        adapter.pieces(call, "image", SimpleNamespace(pooler_output=torch.ones(15, 32)))


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
