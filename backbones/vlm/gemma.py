# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 and Gemma 3n: inputs of each layer by token, and layers that share keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.cost.matrices import token_macs
from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.backbones.vlm.picture import Picture
from visprune.cost.cost import ModelShape
from visprune.cost.layers import Decoder


class PerLayerInputsAdapter(GenericAdapter):
    """A decoder whose layers are given an input of their own for each token.

    The later layers of small models have no keys: they attend to those of the last layer of their
    kind that has.
    """

    by_token = ("per_layer_inputs", "per_layer_input")

    def qk_macs(self, layer: int, *, values: bool = True) -> int:
        """Multiply-adds per token of a decoder layer's queries, keys and, if asked for, values."""
        attention = self.attention(layer)
        parts = (
            getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")[: 2 + values]
        )
        return sum(part.weight.numel() for part in parts if part is not None)

    def attention_arguments(self, layer: int) -> dict[str, Any]:
        """What the attention of a layer takes beside states, mask and positions."""
        return {"shared_kv_states": {}}

    def cost_shape(self) -> ModelShape:
        """As of others; inputs of all layers are projected at once, and later layers run for few.

        Layers without keys of their own run for the tokens whose logits are wanted alone (not in
        older transformers).

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        shape = super().cost_shape()
        assert isinstance(shape.decoder, Decoder), "read from modules"
        layers = list(shape.decoder.layers)
        if self.before_layers:
            project = token_macs(self.language_model.per_layer_model_projection)
            layers[0] = replace(layers[0], token=layers[0].token + project)
        if hasattr(self.language_model, "_maybe_slice_kv_shared_inputs"):
            layers = [
                replace(layer, last_rows=self.keeper(number) != number)
                for number, layer in enumerate(layers)
            ]
        return replace(shape, decoder=replace(shape.decoder, layers=tuple(layers)))

    @property
    def before_layers(self) -> bool:
        """Whether the decoder projects tokens before its first layer."""
        return getattr(self.language_model, "per_layer_model_projection", None) is not None


class Gemma4Adapter(PerLayerInputsAdapter):
    """Patches come with their (x, y), padded by (-1, -1); a clip is one entry."""

    @property
    def head_width(self) -> int:
        """Features of a head; 0 where layers that see all have wider ones than the others."""
        layers: Any = self.layers
        widths = {int(layer.self_attn.head_dim) for layer in layers}
        return widths.pop() if len(widths) == 1 else 0

    @property
    def key_heads(self) -> int:
        """Key heads of a layer; 0 where layers differ."""
        return super().key_heads if self.head_width else 0

    @property
    def merge(self) -> int:
        """Side of the block of patches whose mean becomes one token."""
        return int(self.config.vision_config.pooling_kernel_size)

    @property
    def projector(self) -> nn.Module:
        """What maps the encoder's tokens to the decoder's."""
        return self.core.embed_vision

    @property
    def sees_both_ways(self) -> bool:
        """Whether tokens of a picture see those behind them."""
        return self.text_config.use_bidirectional_attention == "vision"

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """One picture or clip for each entry, encoded together with what pads it."""
        made = super().pieces(call, kind, output)
        places = self._by_entry(call, kind, call[f"{kind}_position_ids"])
        for (picture,), own in zip(made, places, strict=True):
            picture.encoded = (own.shape[1],) * len(own), ()
        return made

    def grids_of(self, call: dict[str, Any], kind: Kind) -> list[Any] | None:
        """(t, h, w) in patches of each picture or clip, from the places of its patches."""
        return [
            (len(own), *(int(x) + 1 for x in own.flatten(0, 1).amax(0).flip(0)))
            for own in self._by_entry(call, kind, call[f"{kind}_position_ids"])
        ]

    def pixels_of(self, call: dict[str, Any], kind: Kind, counts: list[int]) -> list[Any]:
        """The patches of each picture or clip, without what pads them."""
        pixels = call["pixel_values" if kind == "image" else "pixel_values_videos"]
        places = call[f"{kind}_position_ids"]
        return [
            own[(at != -1).all(-1)]
            for own, at in zip(
                self._by_entry(call, kind, pixels), self._by_entry(call, kind, places), strict=True
            )
        ]

    def _by_entry(self, call: dict[str, Any], kind: Kind, rows: Tensor) -> list[Tensor]:
        """The rows ``[t, n, ...]`` of each entry: a picture has one, a clip one for each frame."""
        if kind == "image":
            return list(rows[:, None])
        if call.get("num_frames_per_video") is None:  # stacked, in older transformers
            return list(rows)
        return list(rows.split(torch.as_tensor(call["num_frames_per_video"]).tolist()))


class Gemma3nAdapter(PerLayerInputsAdapter):
    """Layers work on several streams of a token, ``[A, B, S, D]``, of which one is attended to."""

    @property
    def projector(self) -> nn.Module:
        """What maps the encoder's tokens to the decoder's."""
        return self.core.embed_vision

    @property
    def sees_both_ways(self) -> bool:
        """Whether tokens of a picture see those behind them."""
        return False

    def as_rows(self, hidden: Tensor) -> Tensor:
        """All streams of a token side by side, ``[B, S, A * D]``."""
        return hidden.permute(1, 2, 0, 3).flatten(2)

    def as_states(self, rows: Tensor) -> Tensor:
        """As a layer takes them."""
        return rows.unflatten(2, (-1, self.text_config.hidden_size)).permute(2, 0, 1, 3)

    def shown(self, rows: Tensor) -> Tensor:
        """The stream that the next layer attends to."""
        width = self.text_config.hidden_size
        first = self.text_config.altup_active_idx * width
        return rows[..., first : first + width]

    def layer_input(self, layer: Any, hidden: Tensor) -> Tensor:
        """What the attention of a decoder layer is given of the states that enter the layer."""
        predicted = layer.altup.predict(self.as_states(hidden))
        return layer.input_layernorm(predicted[self.text_config.altup_active_idx])
