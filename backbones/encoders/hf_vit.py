# SPDX-License-Identifier: Apache-2.0
"""transformers' plain image encoders, alone, in models around them and in vision-language models.

What is particular to a class stands in two tables: ``TABLE`` of this package names the encoders,
:mod:`visprune.backbones.encoders.hf_around` the models around one. The rest is read from the model:
its layers by :mod:`visprune.backbones.encoders.hf_layers`, prefix tokens and patches from its
embeddings and config.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import (
    EncoderAdapter,
    Layer,
    Reduction,
    ShownQK,
    check_padding,
    places,
)
from visprune.backbones.encoders.hf_heads import head_macs, weigh_pooling, weigh_tokens
from visprune.backbones.encoders.hf_layers import (
    Rows,
    arguments,
    by_function,
    layer_list,
    read_layer,
)
from visprune.backbones.encoders.hf_own_attention import OwnAttention
from visprune.backbones.hf.probe import Attended, Wanted, watch
from visprune.errors import UnsupportedModel

# Tokens before the patches, in the order in which encoders put them.
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


class HfViT(EncoderAdapter):
    """Adapter of transformers' plain image encoders.

    ``hidden_states`` and ``last_hidden_state`` come out short; ``feature_maps`` of a backbone lie
    on the whole grid.

    Args:
        model: the encoder.
        outer: a model around it that classifies or compares pictures, or none.
        mean: whether that takes the mean of the patches: each then counts as often as it stands for
            patches.
    """

    family = "transformers.ViTModel"

    def __init__(self, model: Any, outer: Any = None, *, mean: bool = False) -> None:
        self.model, self.outer, self.mean = model, outer, mean
        blocks, form = layer_list(model)
        self.layers = [read_layer(block, form) for block in blocks]
        self.embed = _embeddings(model, blocks)
        self.config = model.config
        self.width = int(self.config.hidden_size)
        tokens = [_count(self.embed, name, self.width) for name in _PREFIX]
        self.prefix, self.has_cls = sum(tokens), sum(tokens[:2]) > 0
        self.rotary = "position_embeddings" in arguments_of(blocks[0])
        self._forward = type(blocks[0]).forward

    # Patches ------------------------------------------------------------------------------------

    def grid(self, pixels: Tensor) -> tuple[int, ...]:
        """Patches along time (of clips), height and width, of what the embeddings are given."""
        if pixels.dim() == 3:  # SigLIP 2: patches already, whose places come beside them
            return 1, pixels.shape[1]
        size = pixels.shape[-2:]
        found = tuple(side // step for side, step in zip(size, self._patch(), strict=True))
        if pixels.dim() == 5:
            found = (pixels.shape[1] // self._frames_step(), *found)
        return self._seen(found)

    def _seen(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """ViT-MAE sees a part of the patches, in an order that it draws: they have no places."""
        masked = getattr(self.config, "mask_ratio", None)
        return grid if masked is None else (1, int(math.prod(grid) * (1 - masked)))

    def default_grid(self) -> tuple[int, ...]:
        """Patches of the model's own input size."""
        frames = getattr(self.config, "num_frames", None)
        first = () if frames is None else (int(frames) // self._frames_step(),)
        if getattr(self.config, "num_patches", None) is not None:
            side = math.isqrt(self.config.num_patches)
            return side, side
        size, step = _pair(self.config.image_size), self._patch()
        return self._seen((*first, size[0] // step[0], size[1] // step[1]))

    def _patch(self) -> tuple[int, int]:
        tubelet = getattr(self.config, "patch_size", None)
        if tubelet is None:
            tubelet = self.config.tubelet_size[1:]
        return _pair(tubelet)

    def _frames_step(self) -> int:
        tubelet = getattr(self.config, "tubelet_size", 1)
        return int(tubelet if isinstance(tubelet, int) else tubelet[0])

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding, and what follows the encoder in the model itself and in that around it."""
        parts: list[Any] = [m for m in self.embed.modules() if _is_projection(m)]
        weights = sum(part.weight.numel() for part in parts)
        total = round(math.prod(grid) / (1 - getattr(self.config, "mask_ratio", 0.0))) * weights
        if hasattr(self.embed, "resize_positional_embeddings"):  # SigLIP 2, by a product
            total += math.prod(grid) * self.config.num_patches * self.width
        return total + head_macs(self.model, self.outer, self.width, last + self.prefix)

    # A layer ------------------------------------------------------------------------------------

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rotary places of the tokens that are left; the bias goes to the attention itself.

        Raises:
            UnsupportedModel: a mask is given that hides a token.
        """
        given = arguments(self._forward, args[1:], kwargs)
        mask = given.get("attention_mask")
        if mask is not None:
            if _hides(mask):
                raise UnsupportedModel(
                    f"This call of {type(self.model).__name__} masks patches of its pictures, and "
                    f"what a masked token merges into is not known. Give whole pictures, of one "
                    f"size together (batch 1 takes any), without a mask."
                )
            if mask.shape[-1] != args[0].shape[1] or bias is not None:
                given["attention_mask"] = None
        if at is not None and given.get("position_embeddings") is not None:
            tables = given["position_embeddings"]
            given["position_embeddings"] = type(tables)(self._placed(t, at) for t in tables)
        return args[:1], given

    def shapes(self, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Of SigLIP 2, whose embedding is told the sizes of its pictures."""
        given = kwargs.get("spatial_shapes", args[1] if len(args) > 1 else None)
        if not hasattr(self.embed, "resize_positional_embeddings") or given is None:
            return None
        return [(int(height), int(width)) for height, width in torch.as_tensor(given).tolist()]

    def take_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """By whatever name and place the layer takes it."""
        given = arguments(self._forward, args[1:], kwargs)
        mask = given.get("attention_mask")
        check_padding(mask, lengths, self.prefix)
        return args[:1], {**given, "attention_mask": None}, {"attention_mask": mask}

    def _placed(self, table: Tensor, at: Tensor) -> Any:
        """Rows of a rotary table, which has some for the prefix tokens (MLCD) or has not."""
        if not hasattr(self.model, "class_pos_emb"):
            return places(table, at)
        first = torch.arange(self.prefix, device=at.device).expand(at.shape[0], -1)
        return Rows(nn.functional.embedding(torch.cat([first, at + self.prefix], dim=1), table))

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """By the probe of transformers' attention functions."""
        attention: Any = self.layers[number].attention
        if by_function(attention):
            return [watch(attention, functools.partial(_wanted, record))]
        return OwnAttention(attention, record=record).install()

    # What else is indexed by token --------------------------------------------------------------

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Key bias in every attention, pooling by size, feature maps on the whole grid."""
        handles = [handle for layer in self.layers for handle in self.weigh_sizes(layer, reduction)]
        handles += weigh_pooling(self.model, reduction)
        if self.mean:
            handles.append(weigh_tokens(self.model, reduction, self.prefix))
        if type(self.model).__name__.endswith("Backbone"):
            hook = functools.partial(_whole_states, reduction, self.prefix)
            handles.append(self._holder().register_forward_hook(hook))
        return handles

    def weigh_sizes(self, layer: Layer, reduction: Reduction) -> list[Any]:
        """Let the attention of a layer add a bias per key, where tokens have sizes."""
        attention: Any = layer.attention
        if by_function(attention):
            return [watch(attention, functools.partial(_biased, reduction))]
        return OwnAttention(attention, bias=reduction.key_bias).install()

    def whole(self, reduction: Reduction, output: Any) -> Any:
        """Hidden states and the last of them, of each patch."""
        last = output.last_hidden_state
        output.last_hidden_state = _whole(reduction, self.prefix, len(self.layers) - 1, last)
        return (
            output
            if output.hidden_states is None
            else _whole_states(reduction, self.prefix, self.model, (), output)
        )

    def _holder(self) -> nn.Module:
        """The child of a backbone that holds the layers."""
        block = self.layers[0].block
        return next(m for m in self.model.children() if any(part is block for part in m.modules()))


def arguments_of(block: nn.Module) -> Sequence[str]:
    """What a layer's forward takes, by name."""
    return tuple(arguments(type(block).forward, (None,) * 9, {}))


def _embeddings(model: nn.Module, blocks: list[Any]) -> nn.Module:
    """The module that makes tokens of the pixels."""
    inside = {id(part) for block in blocks for part in block.modules()}
    for name, part in model.named_modules():
        if name.split(".")[-1] == "embeddings" and id(part) not in inside:
            return part
    raise UnsupportedModel(f"{type(model).__name__} has no module 'embeddings' that takes pixels.")


def _count(embed: nn.Module, name: str, width: int) -> int:
    token = embed._parameters.get(name)
    return 0 if token is None else token.numel() // width


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear)


def _hides(mask: Tensor) -> bool:
    """Whether a mask hides a token from another; one that adds nothing is none."""
    return not bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())


def _wanted(record: ShownQK) -> Wanted:
    return Wanted(functools.partial(_hand_on, record))


def _hand_on(record: ShownQK, attended: Attended) -> None:
    record(attended.query, attended.key, attended.scale)


def _biased(reduction: Reduction) -> Wanted | None:
    bias = reduction.key_bias()
    return None if bias is None else Wanted(bias=bias)


def _whole_states(reduction: Reduction, prefix: int, module: Any, args: Any, output: Any) -> Any:
    """Hidden states, of which a backbone makes maps: a value for every patch."""
    states = output.hidden_states
    whole = [states[0]]
    for number, y in enumerate(states[1:]):  # transformers leaves out those that nobody reads
        whole.append(None if y is None else _whole(reduction, prefix, number, y))
    output.hidden_states = tuple(whole)
    return output


def _whole(reduction: Reduction, prefix: int, layer: int, y: Tensor) -> Tensor:
    """What left a layer, with a value for every patch."""
    return torch.cat([y[:, :prefix], reduction.expand(layer, y[:, prefix:])], dim=1)
