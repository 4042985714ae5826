# SPDX-License-Identifier: Apache-2.0
"""Read what each decoder layer costs from the layer itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from visprune.backbones.cost.attention import attention_macs, find_attention
from visprune.backbones.cost.matrices import chosen, token_macs
from visprune.cost.layers import Decoder, DecoderLayer
from visprune.errors import UnsupportedModel

_DELTA = ("num_v_heads", "head_k_dim", "head_v_dim")
# Parts whose output is itself a matrix that the token is multiplied with (Gemma 3n).
_MAKES_MATRICES = ("altup",)


def read_decoder(layers: Iterable[nn.Module], head: nn.Module | None, config: object) -> Decoder:
    """Count a decoder.

    Args:
        layers: Its layers.
        head: The language-model head; ``None``: there is none.
        config: The decoder's config, for what its modules do not say: windows, kinds of layers.

    Raises:
        UnsupportedModel: A layer holds what cannot be counted.
    """
    read = tuple(_layer(layer, number, config) for number, layer in enumerate(layers))
    return Decoder(layers=read, head=0 if head is None else token_macs(head))


def _layer(layer: nn.Module, number: int, config: object) -> DecoderLayer:
    """Count one layer: its attention or recurrence, and every other matrix by token."""
    top_k = chosen(config)
    _refuse(layer)
    mixer = _recurrent(layer)
    if mixer is not None:
        recurrent = _state(mixer)
        return replace(recurrent, token=recurrent.token + token_macs(layer, top_k))
    module = find_attention(layer)
    if module is None:  # an MLP alone
        return DecoderLayer(token=token_macs(layer, top_k))
    attention = attention_macs(module, top_k)
    rest = token_macs(layer, top_k) - attention.whole
    return DecoderLayer(
        token=attention.token + rest,
        pair=attention.pair,
        key=attention.key,
        cache=attention.cache,
        window=_window(layer, module, number, config),
    )


def _refuse(layer: nn.Module) -> None:
    """Refuse what the weights alone do not tell: nothing is left out in silence."""
    for name, _ in layer.named_children():
        if name in _MAKES_MATRICES:
            raise UnsupportedModel(
                f"{name} of {type(layer).__name__} makes matrices of the tokens themselves, whose "
                f"products are not counted, so its cost is not known."
            )
    # Text and picture tokens that go to experts of their own (ERNIE).
    sets = [name for name, _ in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    if len(sets) > 1:
        raise UnsupportedModel(
            f"{type(layer).__name__} has several sets of experts ({', '.join(sets)}); which tokens "
            f"go to which is not known, so its cost is not."
        )


def _recurrent(layer: nn.Module) -> Any:
    """The module that carries a state instead of keys; ``None``: there is none."""
    for part in layer.modules():
        own = dict(part.named_children()) | dict(part.named_parameters(recurse=False))
        convolves = any(isinstance(child, nn.Conv1d) for child in part.children())
        if "A_log" in own or (convolves and "in_proj" in own):
            return part
    return None


def _state(mixer: Any) -> DecoderLayer:
    """State of a recurrent module, and what its recurrence adds to its matrices by token."""
    convolved = [m for m in mixer.children() if isinstance(m, nn.Conv1d)]
    # The last inputs of each channel.
    state = sum(m.in_channels * m.kernel_size[0] for m in convolved)
    if not hasattr(mixer, "A_log"):  # a short convolution (LFM2)
        return DecoderLayer(token=0, state=state)
    if any(not isinstance(getattr(mixer, name, None), int) for name in _DELTA):
        raise UnsupportedModel(
            f"The cost of {type(mixer).__name__} is not known. Known among recurrent layers: the "
            f"gated delta rule, short convolutions."
        )
    # Gated delta rule: read the state with the key, add what was missing, read with the query.
    # Kernels that work in chunks spend more on it.
    cells = mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
    return DecoderLayer(token=3 * cells, state=state + cells)


def _window(layer: Any, attention: Any, number: int, config: Any) -> int | None:
    """Most keys that a query of this layer sees; ``None``: all."""
    kinds = getattr(config, "layer_types", None) or ()
    kind = next(
        (
            value
            for owner in (attention, layer)
            for name in ("layer_type", "attention_type")
            if isinstance(value := getattr(owner, name, None), str)
        ),
        kinds[number] if number < len(kinds) else None,
    )
    if kind not in (None, "full_attention", "sliding_attention"):
        raise UnsupportedModel(
            f"The cost of {kind} layers is not known. Known: full_attention, sliding_attention, "
            f"the gated delta rule, short convolutions."
        )
    if kind == "full_attention" or getattr(config, "use_sliding_window", True) is False:
        return None
    # Where the module has no word on it (Mistral), there is one window for all layers.
    window: int | None = getattr(
        attention, "sliding_window", getattr(config, "sliding_window", None)
    )
    return window
