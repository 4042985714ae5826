# SPDX-License-Identifier: Apache-2.0
"""What tiny models of all families are made of, and the prompts that they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.features import lengths

IMAGE, VIDEO, PAD, EOS, VOCAB = 90, 91, 0, 2, 100
VSTART, VEND = 92, 93
WIDTH = 32  # of the decoder

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How one family is made.

    Attributes:
        make: layers of the decoder -> the model.
        picture: name of a picture -> what its processor makes of it, entries along the first axis.
        clip: the same of a clip, ``None``: the family has none.
        prompt: (placeholders, whether a clip) -> the visual part of the prompt.
        extra: inputs -> arguments that depend on the ids.
        by_row: whether pictures of a sample are one row of ``pixel_values``, padded with zeros.
        video_id: placeholder of clips.
        mixes: whether a call may hold pictures and clips.
        layers: of the decoder.
        only_eager: whether it has no other attention implementation.
        params: of methods, by name, where their defaults fit no decoder of so few layers.
        packed: pictures that follow one another along another axis than the first, by argument.
        recurrent: whether layers carry a state: what is dropped cannot be hidden, it is absent.
        scale: what the weights are multiplied by, so that a dropped token matters. States sum up
            over all tokens, and large weights let their rounding grow.
        count: tokens of a picture by its name, where no encoder can be asked.
    """

    make: Callable[[int], Any]
    picture: Callable[[str], Inputs]
    clip: Callable[[str], Inputs] | None = None
    prompt: Callable[[list[int], bool], list[int]] | None = None
    extra: Callable[[Inputs], Inputs] | None = None
    by_row: bool = False
    video_id: int = VIDEO
    mixes: bool = True
    layers: int = 4
    only_eager: bool = False
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    packed: Mapping[str, int] = field(default_factory=dict)
    recurrent: bool = False
    scale: float = 8.0
    count: Callable[[str], int] | None = None


FAMILIES: dict[str, Family] = {}


def family(name: str, picture: Any, **rest: Any) -> Callable[[Any], Any]:
    """Register a builder."""

    def add(make: Callable[[int], Any]) -> Callable[[int], Any]:
        FAMILIES[name] = Family(make=make, picture=picture, **rest)
        return make

    return add


# Parts of configs -------------------------------------------------------------------------------


def text(layers: int, **over: Any) -> dict[str, Any]:
    """A tiny decoder, in the words of most text configs."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        **over,
    }


def vit(**over: Any) -> dict[str, Any]:
    """A tiny encoder of CLIP's or SigLIP's kind."""
    return {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
        **over,
    }


def qwen_vit(**over: Any) -> dict[str, Any]:
    """A tiny encoder of Qwen's kind."""
    return {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": WIDTH,
        **over,
    }


def sliding(layers: int, every: int = 2, window: int = 12) -> dict[str, Any]:
    """Layer types with a full-attention layer at every ``every``-th place."""
    kinds = [
        "full_attention" if i % every == every - 1 else "sliding_attention" for i in range(layers)
    ]
    return {"layer_types": kinds, "sliding_window": window}


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
VIDS = {**IDS, "vision_start_token_id": VSTART, "vision_end_token_id": VEND}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Pictures ---------------------------------------------------------------------------------------


def noise(name: str, *shape: int) -> Tensor:
    """Pixels; their values follow from the name."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(ord(name)))


def square(*shape: int) -> Callable[[str], Inputs]:
    """Pictures of one size: ``pixel_values`` of this shape."""
    return lambda name: {"pixel_values": noise(name, *shape)}


def sized(name: str) -> Inputs:
    """A picture of its own size; a capital letter is a larger one."""
    height, width = (24, 32) if name.isupper() else (24, 16)
    pixels = torch.zeros(1, 3, 24, 32)  # padded to the size of the largest, as processors do
    pixels[..., :height, :width] = noise(name, 1, 3, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def patches(
    key: str = "image", patch: tuple[int, ...] = (96,), **more: Any
) -> Callable[[str], Inputs]:
    """Flat patches with their grid, as Qwen's processors make them; larger for capitals."""

    def make(name: str) -> Inputs:
        t, h, w = (2, 4, 4) if key == "video" else (1, 4, 8) if name.isupper() else (1, 4, 6)
        pixels = "pixel_values" if key == "image" else "pixel_values_videos"
        return {
            pixels: noise(name, t * h * w, *patch),
            f"{key}_grid_thw": torch.tensor([[t, h, w]]),
            **more,
        }

    return make


def wrapped(ids: list[int], clip: bool) -> list[int]:
    """Start and end tokens around the placeholders."""
    return [VSTART, *ids, VEND]


def framed(ids: list[int], clip: bool) -> list[int]:
    """A clip as two frames, each behind text (a timestamp) and inside start and end tokens."""
    half = len(ids) // 2
    if not clip:
        return [VSTART, *ids, VEND]
    return [5, VSTART, *ids[:half], VEND, 5, VSTART, *ids[half:], VEND]


def mm_types(made: Inputs) -> Inputs:
    """``mm_token_type_ids``: 1 image, 2 video."""
    ids = made["input_ids"]
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


# Models and inputs ------------------------------------------------------------------------------

_COUNTS: dict[tuple[str, str], int] = {}


def build(name: str, *, attn: str = "sdpa", seed: int = 0) -> Any:
    """A tiny model, fp32, in eval mode, with weights large enough to matter."""
    torch.manual_seed(seed)
    spec = FAMILIES[name]
    model = spec.make(spec.layers).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 1e-3:
                parameter.normal_(std=0.16)  # next to nothing would hide what enters it
            elif parameter.dim() > 1:
                parameter.mul_(spec.scale)
        # New weights of a norm are all the same, and so is the length of what leaves it: whatever
        # ranks keys by their length would rank the rounding.
        own = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if key.endswith((".q_norm.weight", ".k_norm.weight")):
                parameter.add_(torch.rand(parameter.shape, generator=own) - 0.5)
    model.set_attn_implementation("eager" if spec.only_eager else attn)
    model.generation_config.eos_token_id = None
    for letter in "aA" if spec.clip is None else "aAv":
        _COUNTS[name, letter] = _count(spec, model, letter)
    return model


def _count(spec: Family, model: Any, letter: str) -> int:
    """Tokens of a picture, by asking the encoder."""
    clip = letter == "v"
    if spec.count is not None:
        return spec.count(letter)
    given = _pixels(spec, letter)
    core = getattr(model, "model", model)
    encode = getattr(core, "get_video_features" if clip else "get_image_features", None)
    if encode is None:  # clips are encoded as pictures
        encode = core.get_image_features
        given["pixel_values"] = given.pop("pixel_values_videos")
    known = inspect.signature(encode).parameters
    if spec.by_row:
        given = {key: value[None] for key, value in given.items()}
    with torch.no_grad():
        output = encode(**{k: v for k, v in given.items() if k in known}, return_dict=True)
    return sum(lengths(output))


def _pixels(spec: Family, letter: str) -> Inputs:
    if letter == "v":
        assert spec.clip is not None, "the family has no clips"
        return spec.clip(letter)
    return spec.picture(letter)


def inputs(name: str, rows: list[list[Any]], *, pad_side: str = "left") -> Inputs:
    """Inputs of rows of segments: an int is that many words, a letter a picture, "v" a clip."""
    spec = FAMILIES[name]
    ids: list[list[int]] = []
    pixels: list[list[Inputs]] = []
    for row in rows:
        out: list[int] = [1]
        own: list[Inputs] = []
        for place, part in enumerate(row):
            if isinstance(part, int):
                generator = torch.Generator().manual_seed(place * 10 + part)
                out += torch.randint(6, 80, (part,), generator=generator).tolist()
                continue
            clip = part == "v"
            kind = "v" if clip else "A" if part.isupper() else "a"
            marks = [spec.video_id if clip else IMAGE] * _COUNTS[name, kind]
            out += marks if spec.prompt is None else spec.prompt(marks, clip)
            own.append(_pixels(spec, part))
        ids.append(out)
        pixels.append(own)
    made = {
        **_padded(ids, pad_side),
        **(_by_row(pixels) if spec.by_row else _flat(pixels, spec.packed)),
    }
    return {**made, **(spec.extra(made) if spec.extra is not None else {})}


def _padded(ids: list[list[int]], pad_side: str) -> Inputs:
    width = max(len(row) for row in ids)
    left = pad_side == "left"
    full, mask = [], []
    for row in ids:
        gap = [0] * (width - len(row))
        full.append([*gap, *row] if left else [*row, *gap])
        mask.append([*gap, *[1] * len(row)] if left else [*[1] * len(row), *gap])
    return {"input_ids": torch.tensor(full), "attention_mask": torch.tensor(mask)}


def _flat(pixels: list[list[Inputs]], packed: Mapping[str, int] = MappingProxyType({})) -> Inputs:
    """Entries of all pictures along the first axis, or the one that ``packed`` names."""
    found: dict[str, list[Tensor]] = {}
    for row in pixels:
        for one in row:
            for key, value in one.items():
                found.setdefault(key, []).append(value)
    return {key: torch.cat(parts, packed.get(key, 0)) for key, parts in found.items()}


def _by_row(pixels: list[list[Inputs]]) -> Inputs:
    """One row a sample, padded with zeros to the most entries of any."""
    flat = [_flat([row]) for row in pixels]
    if not any(flat):
        return {}
    shapes = {key: value for row in flat for key, value in row.items()}
    most = max(len(value) for row in flat for value in row.values())
    made = {}
    for key, like in shapes.items():
        out = like.new_zeros(len(flat), most, *like.shape[1:])
        for number, row in enumerate(flat):
            if key in row:
                out[number, : len(row[key])] = row[key]
        made[key] = out
    return made
