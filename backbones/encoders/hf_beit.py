# SPDX-License-Identifier: Apache-2.0
"""transformers' BEiT and Data2Vec, whose attention adds a bias per pair of places."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from visprune.backbones.encoders.base import (
    Hooks,
    Instead,
    Layer,
    Reduction,
    ShownQK,
    weighted_mean,
)
from visprune.backbones.encoders.hf_layers import arguments, by_function
from visprune.backbones.encoders.hf_vit import HfViT
from visprune.backbones.encoders.pair_bias import left, record_class_row
from visprune.backbones.hf.probe import Attended, Wanted, watch

_TABLE = "relative_position_bias_table"
# By what name a layer takes what all of them add: Data2Vec's and the bias of earlier versions of
# BEiT, and the mask that BEiT adds it to.
_SHARED = ("relative_position_bias", "attention_mask")


class HfBeit(HfViT):
    """Adapter of transformers' ``BeitModel``, ``Data2VecVisionModel`` and models around them.

    A token keeps the biases of its patch, and EViT's fused token those of the patch that it stands
    for. Where there is such a bias, methods that merge tokens everywhere are refused: a token of
    several places has none.
    """

    family = "transformers.BeitModel"

    def __init__(self, model: Any, outer: Any = None, *, mean: bool = False) -> None:
        super().__init__(model, outer, mean=mean)
        self.biases = [m for m in model.modules() if hasattr(m, _TABLE)]
        self.rotary = bool(self.biases)  # the places of its tokens are followed
        self.asks = by_function(self.layers[0].attention)

    @property
    def lacking(self) -> dict[str, str]:
        """No merging, and no attention of all queries, beside a bias."""
        name, found = type(self.model).__name__, dict(super().lacking)
        if self.biases:
            bias = f"{name}'s attention adds a bias per pair of places"
            found["merging"] = f"{bias}, which a token merged of several has not"
            found["every_query"] = f"{bias}, which is read for the class token alone"
        elif not self.asks:
            found["merging"] = f"{name}'s attention is written out, and takes no sizes of tokens"
        return found

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layers share, bias and mask, for the tokens that are left."""
        if not self.biases:
            return super().inputs(args, kwargs, bias, at)
        given = arguments(self._forward, args[1:], kwargs)
        for name in _SHARED:
            if at is not None and isinstance(given.get(name), Tensor):
                given[name] = left(given[name], at, self.prefix)
        return args[:1], given

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """The class token's query and the keys, with what is added to their scores."""
        attention: Any = self.layers[number].attention
        if not self.asks:
            return _Written(attention, record).install()
        if not self.biases:
            return super().watch(number, record, every=every)
        wanted = functools.partial(Wanted, functools.partial(_with_mask, record))
        return [watch(attention, wanted)]

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Each bias for the tokens that are left; a mean over patches by size."""
        handles = super().overrides(reduction)
        for module in self.biases:
            forward = functools.partial(_left_of, module, reduction, self.prefix)
            handles.append(Instead(module, "forward", forward))
        pooler: Any = getattr(self.model, "pooler", None)
        if getattr(pooler, "layernorm", None) is not None:
            forward = functools.partial(_pool, pooler, reduction, self.prefix)
            handles.append(Instead(pooler, "forward", forward))
        return handles

    def weigh_sizes(self, layer: Layer, reduction: Reduction) -> list[Any]:
        """Tokens have sizes where there is no bias alone."""
        return [] if self.biases or not self.asks else super().weigh_sizes(layer, reduction)


def _with_mask(record: ShownQK, attended: Attended) -> None:
    record_class_row(record, attended.query, attended.key, attended.scale, attended.mask)


def _left_of(
    module: Any, reduction: Reduction, prefix: int,
    window_size: tuple[int, int], interpolate_pos_encoding: bool = False,
    dim_size: int | None = None,
) -> Tensor:  # fmt: skip
    """In place of a bias module's forward; ``dim_size`` is of a sequence that may be short."""
    whole = prefix + window_size[0] * window_size[1]
    table = type(module).forward(module, window_size, interpolate_pos_encoding, dim_size=whole)
    at = reduction.places()
    return table if at is None else left(table, at, prefix)


def _pool(pooler: Any, reduction: Reduction, prefix: int, hidden_states: Tensor) -> Tensor:
    """In place of a pooler's mean over the patches, where tokens have sizes."""
    size = reduction.sizes(hidden_states.shape[1] - prefix)
    if size is None:
        return type(pooler).forward(pooler, hidden_states)
    return pooler.layernorm(weighted_mean(hidden_states[:, prefix:], size))


class _Written(Hooks):
    """Hooks on an attention module that does not ask transformers for a function."""

    def __init__(self, attention: Any, record: ShownQK) -> None:
        super().__init__()
        self.attention, self.record = attention, record

    def install(self) -> list[Any]:
        """Put them on; the last module that it calls shows all."""
        own, biased = self.attention, self.attention.has_relative_position_bias
        last = (
            own.relative_position_bias.register_forward_hook(self._show_biased)
            if biased
            else own.value.register_forward_hook(self._show)
        )
        return [
            own.register_forward_pre_hook(self._begin, with_kwargs=True),
            own.query.register_forward_hook(self._hold),
            own.key.register_forward_hook(self._hold),
            last,
        ]

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shared = arguments(type(module).forward, args[1:], kwargs).get(_SHARED[0])
        self.call.held = [] if shared is None else [shared]

    def _hold(self, module: nn.Module, args: Any, output: Tensor) -> None:
        heads = output.unflatten(-1, (self.attention.num_attention_heads, -1))
        self.call.held = [*self.call.held, heads.transpose(1, 2)]

    def _show_biased(self, module: nn.Module, args: Any, output: Tensor) -> None:
        held = self.call.held
        self.call.held = [output + held[0] if len(held) == 3 else output, *held[-2:]]
        self._show(module, args, output)

    def _show(self, module: nn.Module, args: Any, output: Tensor) -> None:
        (*added, query, key), self.call.held = self.call.held, []
        scale = self.attention.attention_head_size**-0.5
        record_class_row(self.record, query, key, scale, added[0] if added else None)
