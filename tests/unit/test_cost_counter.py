# SPDX-License-Identifier: Apache-2.0
"""Our counts against torch's own counter, which watches the matrix products of real models run.

The models are tiny and random. They run with eager attention: the counter knows no formula for
CPU's ``scaled_dot_product_attention`` and reads it as zero. It counts the full square of a causal
attention, hence ``causal="dense"``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.cost_configs import (
    clip_vision_shape,
    decoder_shape,
    llava_projector_shape,
    pixtral_vision_shape,
    qwen2_5_vl_vision_shape,
    qwen2_vl_vision_shape,
    qwen_merger_shape,
)
from visprune.backbones.cost.decoder import read_decoder
from visprune.backbones.cost.encoder import read_encoder, read_projector
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.cost.cost import (
    ModelShape,
    VisionShape,
    decode_macs,
    lm_head_macs,
    prefill_macs,
    projected_tokens,
    sample_cost,
)

IMAGE, VIDEO, START = 90, 91, 92
LLAVA_PARTS = (".vision_tower", ".multi_modal_projector")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 1024,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@dataclass
class Family:
    """A tiny model, what it is fed, and what its modules and its config say that it costs."""

    model: Any
    told: ModelShape
    grids: list[tuple[int, int, int]]
    pictures: dict[str, torch.Tensor]
    vision: str
    projector: str
    token: int = IMAGE
    # Tokens that are not projected but stand in the prompt (LLaVA-NeXT's newlines).
    newlines: int = 0

    @property
    def shape(self) -> ModelShape:
        """As the library reads it: from the modules."""
        core, head = self.model.model, self.model.lm_head
        text = core.language_model
        tower = core.get_submodule(self.vision[1:])
        projectors = [core.get_submodule(self.projector[1:])]
        return ModelShape(
            read_decoder(text.layers, head, text.config),
            read_encoder(tower, projectors),
            read_projector(
                projectors,
                tower,
                merge=self.told.projector.merge,
                keeps_cls=self.told.projector.keeps_cls,
            ),
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        visual = projected_tokens(self.told.projector, self.grids) + self.newlines
        ids = torch.tensor([[1, 2, 3, START, *[self.token] * visual, 4, 5, 6, 7]])
        if self.vision == ".visual":
            # What Qwen's processors return beside the ids: 0 text, 1 image, 2 video.
            kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
            return {"input_ids": ids, "mm_token_type_ids": kinds, **self.pictures}
        return {"input_ids": ids, **self.pictures}


def _build(config: Any, kind: Any, **values: Any) -> Any:
    torch.manual_seed(0)
    return kind._from_config(config(**values), attn_implementation="eager").eval()


def _llava_shape(config: Any) -> ModelShape:
    return ModelShape(
        decoder_shape(config.text_config),
        clip_vision_shape(config.vision_config),
        llava_projector_shape(config),
    )


def llava(select: str = "default", layer: int | list[int] = -2) -> Family:
    model = _build(
        tf.LlavaConfig,
        tf.LlavaForConditionalGeneration,
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_select_strategy=select,
        vision_feature_layer=layer,
    )
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28)}
    return Family(model, _llava_shape(model.config), [(1, 4, 4)] * 2, pixels, *LLAVA_PARTS)


def pixtral() -> Family:
    vision = {**CLIP, "model_type": "pixtral", "image_size": 70}
    model = _build(
        tf.LlavaConfig,
        tf.LlavaForConditionalGeneration,
        vision_config=vision,
        text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    config = model.config
    shape = ModelShape(
        decoder_shape(config.text_config),
        pixtral_vision_shape(config.vision_config),
        llava_projector_shape(config),
    )
    pixels = {"pixel_values": torch.randn(1, 3, 42, 28), "image_sizes": torch.tensor([[42, 28]])}
    return Family(model, shape, [(1, 6, 4)], pixels, *LLAVA_PARTS)


def llava_next() -> Family:
    model = _build(
        tf.LlavaNextConfig,
        tf.LlavaNextForConditionalGeneration,
        vision_config=CLIP,
        # A head width other than hidden_size / heads, and a window longer than the prompt.
        text_config={"model_type": "mistral", "head_dim": 12, "sliding_window": 512, **TEXT},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    pixels = {
        "pixel_values": torch.randn(1, 3, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 56]]),  # two crops side by side, and the thumbnail
    }
    shape = _llava_shape(model.config)
    return Family(model, shape, [(1, 4, 4)] * 3, pixels, *LLAVA_PARTS, newlines=4)


def _qwen(kind: Any, config: Any, vision: dict[str, Any], read: Callable[..., Any]) -> Family:
    model = _build(
        config,
        kind,
        vision_config=vision,
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
    )
    shape = ModelShape(
        decoder_shape(model.config.text_config),
        read(model.config.vision_config),
        qwen_merger_shape(model.config.vision_config),
    )
    return Family(model, shape, [], {}, ".visual", ".visual.merger")


def _patch_dim(family: Family) -> int:
    assert isinstance(family.told.vision, VisionShape)
    return family.told.vision.patch_dim


def _image(family: Family, h: int, w: int) -> Family:
    family.grids = [(1, h, w)]
    family.pictures = {
        "pixel_values": torch.randn(h * w, _patch_dim(family)),
        "image_grid_thw": torch.tensor(family.grids),
    }
    return family


def _video(family: Family, t: int, h: int, w: int) -> Family:
    family.grids, family.token = [(t, h, w)], VIDEO
    family.pictures = {
        "pixel_values_videos": torch.randn(t * h * w, _patch_dim(family)),
        "video_grid_thw": torch.tensor(family.grids),
    }
    return family


def _qwen2() -> Family:
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    return _qwen(
        tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, vision, qwen2_vl_vision_shape
    )


def _qwen2_5() -> Family:
    vision = {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 20,  # 5 patches, which is 2 merged ones: a side of 4
        "fullatt_block_indexes": [1],
    }
    kind = tf.Qwen2_5_VLForConditionalGeneration
    return _qwen(kind, tf.Qwen2_5_VLConfig, vision, qwen2_5_vl_vision_shape)


FAMILIES: dict[str, Callable[[], Family]] = {
    "llava": llava,
    "llava with CLS, two feature layers": lambda: llava("full", [-2, -3]),
    "pixtral": pixtral,
    "llava_next": llava_next,
    "qwen2_vl image": lambda: _image(_qwen2(), 6, 10),
    "qwen2_vl video": lambda: _video(_qwen2(), 3, 4, 6),
    # Sides that are no multiple of the window, and ones that are.
    "qwen2_5_vl image, ragged windows": lambda: _image(_qwen2_5(), 6, 10),
    "qwen2_5_vl image, whole windows": lambda: _image(_qwen2_5(), 8, 4),
    "qwen2_5_vl video": lambda: _video(_qwen2_5(), 2, 4, 10),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]()


class Counter:
    """Multiply-adds by module, of what ran inside ``with``."""

    def __enter__(self) -> Counter:
        self._grad = torch.no_grad()
        self._mode = FlopCounterMode(display=False)
        self._grad.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._grad.__exit__(*error)

    def macs(self, suffix: str) -> int:
        """Multiply-adds of the one module whose path ends with ``suffix``."""
        counts = self._mode.get_flop_counts()
        found = [sum(ops.values()) for name, ops in counts.items() if name.endswith(suffix)]
        assert len(found) == 1, (suffix, list(counts))
        assert found[0] > 0
        return found[0] // 2

    def layers(self) -> int:
        """Multiply-adds of all decoder layers: rotary embeddings stand beside them."""
        return sum(self.macs(f".language_model.layers.{layer}") for layer in range(3))


def test_modules_and_config_tell_the_same(family: Family) -> None:
    read, told = family.shape, family.told
    assert read.decoder.layers == told.decoder.layers
    assert read.decoder.head == told.decoder.head
    for name in ("layers", "patch", "prefix", "pooled", "pooled_token"):
        assert getattr(read.vision, name) == getattr(told.vision, name)
    assert read.projector.macs_per_token == told.projector.macs_per_token


def test_every_part_is_what_the_counter_saw(family: Family) -> None:
    inputs = family.inputs()
    tokens = inputs["input_ids"].shape[1]
    with Counter() as counter:
        family.model(**inputs)
    cost = sample_cost(
        family.shape,
        tokens_per_layer=tokens,
        grids=family.grids,
        head_rows=tokens,
        causal="dense",
        dtype=torch.float32,
    )
    projector = counter.macs(family.projector)
    vision = counter.macs(family.vision)
    if family.projector.startswith(family.vision):
        vision -= projector
    assert cost.vision == vision
    assert cost.projector == projector
    assert cost.prefill == counter.layers()
    assert cost.lm_head == counter.macs(".lm_head")
    assert cost.decode == cost.selection == 0


def test_second_turn_and_decode_read_the_cache(family: Family) -> None:
    inputs = family.inputs()
    first = inputs["input_ids"].shape[1]
    with torch.no_grad():
        cache = cache_of(family.model(**inputs, use_cache=True))
    decoder = family.shape.decoder
    with Counter() as turn:
        more = torch.tensor([[8, 9, 10, 11, 12]])
        family.model(input_ids=more, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    assert turn.layers() == prefill_macs(decoder, 5, cached=first, causal="dense")
    assert turn.macs(".lm_head") == lm_head_macs(decoder, 1)
    steps = 0
    for token in (13, 14):
        with Counter() as step:
            one = torch.tensor([[token]])
            family.model(input_ids=one, **{CACHE_ARGUMENT: cache}, use_cache=True)
        steps += step.layers()
    assert steps == decode_macs(decoder, first + 5, steps=2)


def test_layers_of_different_lengths() -> None:
    family = llava()
    text = family.model.model.language_model
    tokens = [21, 13, 5]
    hidden = torch.randn(1, tokens[0], 32)
    with torch.no_grad():
        rotary = text.rotary_emb(hidden, torch.arange(tokens[0])[None])
    with Counter() as counter:
        for layer, kept in zip(text.layers, tokens, strict=True):
            out = layer(hidden[:, :kept], position_embeddings=tuple(r[:, :kept] for r in rotary))
            hidden = out[0] if isinstance(out, tuple) else out
    counted = sum(counter._mode.get_flop_counts()["Global"].values()) // 2
    assert prefill_macs(family.shape.decoder, tokens, causal="dense") == counted


@pytest.mark.parametrize("build", [_qwen2, _qwen2_5])
def test_pictures_of_different_sizes_and_a_clip_in_one_call(build: Callable[[], Family]) -> None:
    family = build()
    grids = [(1, 6, 10), (2, 4, 4), (1, 2, 14)]
    patches = torch.randn(sum(t * h * w for t, h, w in grids), _patch_dim(family))
    with Counter() as counter:
        family.model.model.visual(patches, grid_thw=torch.tensor(grids))
    cost = sample_cost(family.shape, tokens_per_layer=0, grids=torch.tensor(grids), dtype=4)
    assert cost.vision + cost.projector == counter.macs("Global")
