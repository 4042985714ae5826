# SPDX-License-Identifier: Apache-2.0
"""transformers' image encoders and the models around them, shrunk to run in tests."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.encoders.small import enlarged
from visprune.backbones.encoders import AROUND, AROUND_OTHER, PLAIN

SIDE, PATCH, LAYERS = 24, 4, 3
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "mlp_ratio": 2,
    "layerscale_value": 0.5, "layer_scale_init_value": 0.5, "num_labels": 3, "projection_dim": 16,
    # In the config of a model of both: text of the smallest kind.
    "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "type_vocab_size": 2, "project_dim": 16, "projection_size": 32,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "VideoMAE": {"num_frames": 4, "tubelet_size": 2},
    "Vivit": {"num_frames": 4, "tubelet_size": [2, PATCH, PATCH]},
    "Siglip2": {"num_patches": 36},
    "ViTMAE": {"mask_ratio": 0.25},
    "InternVL": {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
    "QianfanOCR": {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
    "DINOv3": {"num_register_tokens": 2, "pos_embed_rescale": None},
    "Dinov2WithRegisters": {"num_register_tokens": 2},
}
# Configurations beside the plain one, each of which takes another way through the model.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Dinov2Model-swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "Dinov2Model-drop_path": ("Dinov2Model", {"drop_path_rate": 0.1}),
    "DINOv3ViTModel-gated": ("DINOv3ViTModel", {"use_gated_mlp": True}),
    "DINOv3ViTModel-no_registers": ("DINOv3ViTModel", {"num_register_tokens": 0}),
    "InternVLVisionModel-qk_norm": ("InternVLVisionModel", {"use_qk_norm": True}),
    "InternVLVisionModel-rms_norm": ("InternVLVisionModel", {"norm_type": "rms_norm"}),
    "ViTModel-no_bias": ("ViTModel", {"qkv_bias": False}),
    "Aimv2VisionModel-head": ("Aimv2VisionModel", {"use_head": True}),
    "Aimv2VisionModel-native": ("Aimv2VisionModel", {"is_native": True}),
    "SiglipVisionModel-no_head": ("SiglipVisionModel", {"vision_use_head": False}),
    "VideoMAEModel-mean": ("VideoMAEModel", {"use_mean_pooling": False}),
    "VideoMAEForVideoClassification-first": (
        "VideoMAEForVideoClassification", {"use_mean_pooling": False}),
    "ViTModel-eager": ("ViTModel", {"attn_implementation": "eager"}),
    "Idefics3VisionTransformer-eager": (
        "Idefics3VisionTransformer", {"attn_implementation": "eager"}),
}  # fmt: skip
# Those in which no tokens merge, or which give all patches back, have tests of their own.
NAMES = (*PLAIN, *(name for name in AROUND if name not in AROUND_OTHER), *VARIANTS)


def _class(name: str) -> Any:
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    for kind in ("idefics3", "smolvlm", "idefics2", "owlvit", "owlv2", "kosmos2"):
        module = getattr(transformers.models, kind)
        found = getattr(getattr(module, f"modeling_{kind}"), name, None)
        if found is not None:
            return found
    raise LookupError(name)


def _own(name: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for start, options in OWN.items():
        if name.startswith(start):
            given |= options
    return given


def _fitted(config: Any, given: dict[str, Any]) -> None:
    for key, value in given.items():
        if hasattr(config, key) and key not in ("attn_implementation",):
            setattr(config, key, copy.copy(value))
    for part in ("vision_config", "text_config"):
        inner = getattr(config, part, None)
        if inner is not None and not isinstance(inner, dict):
            _fitted(inner, given)


def build(name: str, **options: Any) -> Any:
    """A model of ``name``, a class or one of :data:`VARIANTS`, whose every weight matters."""
    kind, own = VARIANTS.get(name, (name, {}))
    given = {**SIZES, **_own(kind), **own, **options}
    cls = _class(kind)
    config = cls.config_class()
    _fitted(config, given)
    if kind.endswith("Backbone"):
        stages = [f"stage{n}" for n in range(LAYERS + 1)]
        config = cls.config_class(**{k: v for k, v in given.items() if hasattr(config, k)})
        config.stage_names = ["stem", *stages[1:]]
        config.out_features = config.stage_names[1:]
    torch.manual_seed(0)
    chosen = given.get("attn_implementation")
    if chosen is not None:
        config._attn_implementation = chosen
    model = cls(config)
    return _enlarged(model).eval()


def _enlarged(model: Any) -> Any:
    """As :func:`enlarged`; a parameter without numbers stays."""
    empty = [p for p in model.parameters() if not p.numel()]
    for parameter in empty:
        parameter.data = parameter.data.new_ones(1, 1)
    enlarged(model)
    for parameter in empty:
        parameter.data = parameter.data.new_empty(1, 0, model.config.hidden_size)
    return model


@functools.cache
def shared(name: str) -> Any:
    """A model that tests share and leave as it was."""
    return build(name)


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """What it takes: pixels, and a text where it compares."""
    generator = torch.Generator().manual_seed(seed)
    kind = VARIANTS.get(name, (name, {}))[0]
    if kind.startswith("Siglip2"):
        given = {
            "pixel_values": torch.randn(batch, 36, 3 * PATCH * PATCH, generator=generator),
            "pixel_attention_mask": torch.ones(batch, 36, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[6, 6]] * batch),
        }
    else:
        frames = (4,) if kind.startswith(("VideoMAE", "Vivit")) else ()
        shape = (batch, *frames, 3, SIDE, SIDE)
        given = {"pixel_values": torch.randn(*shape, generator=generator)}
    if kind in AROUND and kind.endswith("Model"):
        given["input_ids"] = torch.randint(3, 40, (batch, 5), generator=generator)
        given["input_ids"][:, -1] = 1
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    if kind.startswith("ViTMAE"):
        given["noise"] = torch.rand(batch, 36, generator=generator)
    return given


def in_pairs(pixels: Tensor) -> Tensor:
    """The same pictures with every second patch of a row equal to the one before."""
    if pixels.dim() == 3:
        pixels = pixels.clone()
        pixels[:, 1::2] = pixels[:, ::2]
        return pixels
    columns = pixels.clone().unflatten(-1, (-1, 2, PATCH))
    columns[..., 1, :] = columns[..., 0, :]
    return columns.flatten(-3)


def answer(output: Any) -> Tensor:
    """What a model says in the end: logits, a pooled vector, or its tokens."""
    for name in ("logits", "logits_per_image", "image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if found is not None:
            return found
    maps = getattr(output, "feature_maps", None)
    return output.last_hidden_state if maps is None else torch.stack(maps)


def tower(model: Any) -> Any:
    """The encoder itself."""
    name = type(model).__name__
    return model.get_submodule(AROUND[name][0]) if name in AROUND else model
