# SPDX-License-Identifier: Apache-2.0
"""Costs read from modules of many kinds, against torch's counter and what is really stored.

Experts, latents, windows, fused and shared projections, quantised and adapted layers: nothing here
has a reader of its own. The models are tiny and random and run with eager attention, as the counter
has to see matrix products; it counts the full square of a causal attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import timm
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests import tiny
from visprune.backbones.cost.decoder import read_decoder
from visprune.backbones.cost.encoder import read_encoder, read_projector
from visprune.backbones.cost.matrices import matrix_weights, token_macs
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.cost import Decoder, decode_macs, kv_bytes, prefill_macs, visible_pairs, vision_macs
from visprune.errors import UnsupportedModel
from visprune.machine.find import find_adapter

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 7,
}
EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2}
DECODERS: dict[str, Callable[[], Any]] = {
    "grouped": lambda: tf.Qwen3Config(**TEXT),
    "experts": lambda: tf.Qwen3MoeConfig(
        **TEXT, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12,
        mlp_only_layers=[1], decoder_sparse_step=1
    ),
    "latent, shared experts": lambda: tf.DeepseekV3Config(
        **{**TEXT, **LATENT}, **EXPERTS, n_shared_experts=1, moe_intermediate_size=12,
        first_k_dense_replace=1
    ),
    "latent, no query rank": lambda: tf.DeepseekV3Config(
        **{**TEXT, **LATENT, "q_lora_rank": None}, **EXPERTS, first_k_dense_replace=3
    ),
    "windows": lambda: tf.Gemma3TextConfig(**TEXT, **WINDOWS, sliding_window=6),
    "one window": lambda: tf.MistralConfig(**TEXT, sliding_window=6),
    "fused": lambda: tf.Phi3Config(**TEXT),
    "no gate": lambda: tf.PersimmonConfig(**{**TEXT, "num_key_value_heads": 4}),
}  # fmt: skip


def _decoder(name: str) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(DECODERS[name](), attn_implementation="eager")
    if "experts" in name:
        # Batched kernels are padded; one product for each expert is what the counter shall see.
        model.set_experts_implementation("eager")
    return model.eval()


def _read(model: Any) -> Decoder:
    return read_decoder(model.model.layers, model.get_output_embeddings(), model.model.config)


def _counted(call: Callable[[], Any]) -> dict[str, int]:
    """Multiply-adds by module of what runs in ``call``."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}


def _layers(counts: dict[str, int]) -> int:
    found = [macs for name, macs in counts.items() if name.rpartition(".")[0].endswith(".layers")]
    assert len(found) == 3
    return sum(found)


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_a_second_turn_and_decoding(name: str) -> None:
    model, kept = _decoder(name), {}
    decoder = _read(model)

    def turn(*ids: int, **extra: Any) -> Callable[[], None]:
        def call() -> None:
            out = model(input_ids=torch.tensor([ids]), use_cache=True, **kept, **extra)
            kept[CACHE_ARGUMENT] = cache_of(out)

        return call

    first = _counted(turn(*range(1, 12)))
    assert _layers(first) == prefill_macs(decoder, 11, causal="dense")
    assert first[f"{type(model).__name__}.lm_head"] == 11 * decoder.head
    if "window" in name:
        return  # the cache of a window is cut: below, every key is there
    second = _counted(turn(3, 4, 5, 6))
    assert _layers(second) == prefill_macs(decoder, 4, cached=11, causal="dense")
    steps = [_layers(_counted(turn(token))) for token in (7, 8)]
    assert sum(steps) == decode_macs(decoder, 15, steps=2)


def _numbers(cache: Any) -> int:
    """Numbers that a cache holds, as tensors: no promise of anybody's."""
    found: dict[int, Tensor] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            held = value.values() if isinstance(value, dict) else [value]
            found |= {id(x): x for x in held if isinstance(x, Tensor) and x.dim() > 1}
    return sum(x.numel() for x in found.values())


@pytest.mark.parametrize("name", DECODERS)
def test_bytes_are_those_of_the_cache(name: str) -> None:
    model = _decoder(name)
    with torch.no_grad():
        cache = cache_of(model(input_ids=torch.arange(1, 6)[None], use_cache=True))
    assert kv_bytes(_read(model), 5, torch.float32) == 4 * _numbers(cache)


@pytest.mark.parametrize("name", ["windows", "one window", "grouped"])
def test_pairs_are_the_open_cells_of_each_layers_mask(name: str) -> None:
    model = _decoder(name)
    cells: list[int] = []

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        cells.append(int((kwargs["attention_mask"] == 0).sum()))

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 20)[None])
    layers = _read(model).layers
    assert cells == [visible_pairs(19, window=layer.window) for layer in layers]


def test_recurrent_layers_store_a_state_of_one_size() -> None:
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    config = tf.Qwen3NextConfig(
        **TEXT, layer_types=kinds, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12,
        shared_expert_intermediate_size=12, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=6, linear_value_head_dim=5, linear_conv_kernel_dim=4
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    decoder = _read(model)
    recurrent, full, _ = decoder.layers
    assert recurrent.pair == recurrent.cache == full.state == 0
    with torch.no_grad():
        cache = cache_of(model(input_ids=torch.arange(1, 6)[None], use_cache=True))
    states, keys = 2 * recurrent.state, full.cache
    assert _numbers(cache) == states + 5 * keys
    # One token. Of the recurrence (three products with the state, element by element) the counter
    # sees nothing; the convolution is run for the token before as well, whose output is dropped.
    counts = _counted(lambda: model(input_ids=torch.tensor([[3]]), **{CACHE_ARGUMENT: cache}))
    mixer = next(m for m in model.modules() if type(m).__name__ == "Qwen3NextGatedDeltaNet")
    seen = counts[f"{type(model).__name__}.model.layers.0"]
    assert recurrent.token == seen - mixer.conv1d.weight.numel() + 3 * 4 * 6 * 5


# Encoders ---------------------------------------------------------------------------------------

VIT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "class token": lambda: tf.CLIPVisionConfig(**VIT),
    "pooling head": lambda: tf.SiglipVisionConfig(**VIT),
    "gated, two axes": lambda: tf.PixtralVisionConfig(**{**VIT, "hidden_size": 32}),
    "registers": lambda: tf.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_many_kinds(name: str) -> None:
    torch.manual_seed(0)
    config = ENCODERS[name]()
    kind = tf.CLIPVisionModel if name == "class token" else tf.AutoModel
    make = kind._from_config if name == "class token" else kind.from_config
    model = make(config, attn_implementation="eager").eval()
    counts = _counted(lambda: model(pixel_values=torch.randn(1, 3, 24, 24)))
    assert vision_macs(read_encoder(model), [(1, 6, 6)]) == counts["Global"]


def test_mergers_of_earlier_layers_are_projectors_too() -> None:
    vision = {
        "depth": 3, "num_heads": 2, "hidden_size": 16, "intermediate_size": 32, "patch_size": 4,
        "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = tf.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    model = tf.Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    visual = model.model.visual.eval()
    projector = read_projector([visual.merger], visual, merge=2)
    patches = torch.randn(6 * 8, 3 * 2 * 4 * 4)
    counts = _counted(lambda: visual(patches, grid_thw=torch.tensor([[1, 6, 8]])))
    encoder = vision_macs(read_encoder(visual, [visual.merger]), [(1, 6, 8)])
    assert encoder + 12 * projector.macs_per_token == counts["Global"]


def test_a_convolution_that_joins_patches_is_a_projector_too() -> None:
    vision = {
        "depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 32, "patch_size": 4,
        "out_hidden_size": 32, "image_size": 32, "spatial_merge_size": 2,
    }  # fmt: skip
    config = tf.Glm4vVisionConfig(**vision)
    visual = tf.Glm4vVisionModel._from_config(config, attn_implementation="eager").eval()
    projector = read_projector([visual.merger], visual, merge=2)
    patches = torch.randn(6 * 8, 3 * 2 * 4 * 4)
    counts = _counted(lambda: visual(patches, grid_thw=torch.tensor([[1, 6, 8]])))
    encoder = vision_macs(read_encoder(visual, [visual.merger]), [(1, 6, 8)])
    assert encoder + 12 * projector.macs_per_token == counts["Global"]


# Layers that are stored otherwise ---------------------------------------------------------------


def _quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_int8_costs_as_many_multiply_adds(family: str) -> None:
    model = tiny.build(family)
    plain = find_adapter(model).cost_shape()
    assert find_adapter(_quantised(model)).cost_shape() == plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_int8_of_a_vision_transformer() -> None:
    name, sizes = "vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "num_classes": 7}
    costs = []
    for change in (lambda model: model, _quantised):
        model = change(timm.create_model(name, **sizes).eval())
        with visprune.prune(model, "tome", r=3) as run:
            costs.append(run.cost())
    assert costs[0] == costs[1]
    assert costs[0].vision > 16 * 2 * 12 * 192 * 192


def test_low_rank_adapters_count_while_they_run() -> None:
    model = _decoder("grouped")
    plain = _read(model)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    more = 3 * (32 + 32) + 3 * (56 + 32)
    layers = _read(model).layers
    assert [layer.token for layer in layers] == [layer.token + more for layer in plain.layers]
    assert layers[0].pair == plain.layers[0].pair
    counts = _counted(lambda: model(input_ids=torch.arange(1, 8)[None]))
    assert _layers(counts) == prefill_macs(_read(model), 7, causal="dense")
    with adapted.disable_adapter():
        assert _read(model).layers == plain.layers
    adapted.merge_adapter()
    assert _read(model).layers == plain.layers


# What cannot be counted is refused --------------------------------------------------------------


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 5))


class _Experts(nn.Module):
    num_experts = 4

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(4, 5, 6))


class _Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = 3
        self.experts = _Experts()


class _Expert(nn.Linear):
    pass


def test_experts_count_as_often_as_they_are_chosen() -> None:
    assert token_macs(_Routed()) == 3 * 5 * 6
    assert token_macs(nn.Sequential(_Experts()), top_k=2) == 2 * 5 * 6
    listed = nn.ModuleList([_Expert(5, 6, bias=False) for _ in range(4)])
    assert token_macs(listed, top_k=1) == 5 * 6
    with pytest.raises(UnsupportedModel, match=r"4 experts of _Experts .* is not known"):
        token_macs(_Experts())


def test_a_weight_of_unknown_use_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"_Table\.scale \[4, 5\] does to a token"):
        token_macs(nn.Sequential(nn.Linear(4, 4), _Table()))
    assert matrix_weights(nn.Sequential(nn.Linear(4, 4), _Table())) == 16


def test_experts_of_two_kinds_are_refused() -> None:
    layer = nn.ModuleDict({"text": _Routed(), "picture": _Routed()})
    with pytest.raises(UnsupportedModel, match=r"several sets of experts \(text\.experts, picture"):
        read_decoder([layer], None, object())


def test_layers_of_an_unknown_kind_are_refused() -> None:
    model = _decoder("grouped")
    attention = model.model.layers[1].self_attn
    attention.layer_type = "chunked_attention"
    with pytest.raises(UnsupportedModel, match="chunked_attention layers is not known"):
        _read(model)
    attention.layer_type = "full_attention"
    attention.indexer = nn.Linear(32, 4)
    with pytest.raises(UnsupportedModel, match="with indexer it is not one softmax"):
        _read(model)
    del attention.indexer
    model.model.layers[1].altup = nn.Linear(32, 4)
    with pytest.raises(UnsupportedModel, match="altup of Qwen3DecoderLayer makes matrices"):
        _read(model)


def test_an_encoder_with_a_part_of_unknown_use_is_refused() -> None:
    model = tf.CLIPVisionModel(tf.CLIPVisionConfig(**VIT))
    model.neck = nn.Conv2d(24, 24, 3)
    with pytest.raises(UnsupportedModel, match="On how many tokens neck of CLIPVisionModel"):
        read_encoder(model)
    with pytest.raises(UnsupportedModel, match="Sequential has 0 stacks of layers"):
        read_encoder(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(UnsupportedModel, match="projector MultiheadAttention attends"):
        read_projector([nn.MultiheadAttention(8, 2)])
