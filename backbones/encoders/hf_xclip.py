# SPDX-License-Identifier: Apache-2.0
"""transformers' X-CLIP, whose frames send each other a message in every layer."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import Layer, Reduction, ShownQK
from visprune.backbones.encoders.hf_vit import HfViT
from visprune.backbones.hf.probe import Attended, Wanted, watch


class HfXCLIP(HfViT):
    """Adapter of transformers' ``XCLIPVisionModel`` and the ``XCLIPModel`` around it.

    A layer makes a message token of each frame's class token, has the messages of a clip attend to
    each other, and takes the frame's own away once the patches have attended to it. Tokens leave at
    a layer's end. ``last_hidden_state`` has a value for every patch, since ``XCLIPModel`` takes the
    mean over frames of the patches at one place: methods that leave patches without one are
    refused. ``hidden_states`` before come out short.
    """

    family = "transformers.XCLIPVisionModel"
    gives_whole = True

    def __init__(self, model: Any, outer: Any = None, *, mean: bool = False) -> None:
        super().__init__(model, outer, mean=mean)
        self.layers = [self._with_message(layer) for layer in self.layers]

    def _with_message(self, layer: Layer) -> Layer:
        """A layer whose tokens all attend to the message, which is none of them."""
        block: Any = layer.block
        weights = matrix_weights(block.self_attn) + matrix_weights(block.mlp)
        return replace(layer, attention_weights=weights + 2 * 2 * layer.attention_width)

    @property
    def lacking(self) -> dict[str, str]:
        """No dropping, and no rows of attention."""
        message = "a query's attention is to the message of the other frames, too"
        return {
            **super().lacking,
            "dropping": "X-CLIP takes the mean over frames of the patches at one place",
            "cls_token": message,
            "every_query": message,
        }

    def default_grid(self) -> tuple[int, ...]:
        """Patches of a frame of the model's own size: frames come as pictures."""
        return super().default_grid()[1:]

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding and heads, and a frame's messages."""
        return super().fixed_macs(grid, last) + sum(map(self._message_macs, self.layers))

    def _message_macs(self, layer: Layer) -> int:
        """A message is made, attends to those of its clip, and is a token of the attention."""
        block: Any = layer.block
        own = matrix_weights(block.message_fc) + matrix_weights(block.message_attn)
        pair = 2 * layer.attention_width
        return own + pair * int(block.num_frames) + matrix_weights(block.self_attn) + pair

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """Queries and keys of the frame's own tokens."""
        wanted = functools.partial(Wanted, functools.partial(_without_message, record))
        return [watch(self.layers[number].attention, wanted)]

    def weigh_sizes(self, layer: Layer, reduction: Reduction) -> list[Any]:
        """The message is one token behind the others."""
        return [watch(layer.attention, functools.partial(_biased, reduction))]


def _without_message(record: ShownQK, attended: Attended) -> None:
    record(attended.query[:, :, :-1], attended.key[:, :, :-1], attended.scale)


def _biased(reduction: Reduction) -> Wanted | None:
    bias = reduction.key_bias()
    return None if bias is None else Wanted(bias=nn.functional.pad(bias, (0, 1)))
