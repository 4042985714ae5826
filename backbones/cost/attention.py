# SPDX-License-Identifier: Apache-2.0
"""What softmax attention costs for each pair, and stores for each token, from its projections.

A pair of a query and a key takes as many multiply-adds as all heads have features: once for the
score (width of the queries), once for the value (width of what the output projection reads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from visprune.backbones.cost.matrices import linear, token_macs
from visprune.errors import UnsupportedModel

_OUT = ("o_proj", "out_proj", "proj", "projection_layer", "dense")
_FUSED = ("qkv", "qkv_proj", "query_key_value", "Wqkv")
_APART = (("k_proj", "v_proj"), ("k", "v"))
# Parts that make attention another thing than one softmax over stored keys.
_OTHER = ("indexer", "conv1d", "A_log", "dt_bias")


@dataclass(frozen=True)
class AttentionMacs:
    """One attention module.

    Attributes:
        whole: multiply-adds of every matrix in it, for one token.
        token: those that are done once for each token that enters.
        pair: for each pair of a query and a key.
        key: for each key of a call, stored ones included.
        cache: numbers stored for each token.
    """

    whole: int
    token: int
    pair: int
    key: int = 0
    cache: int = 0


def find_attention(block: nn.Module) -> nn.Module | None:
    """The attention module of a layer; ``None`` where it has none.

    Raises:
        UnsupportedModel: it has several, or one over something else than its own tokens.
    """
    found = [part for part in block.modules() if _output(part) is not None and _inputs(part)]
    if len(found) > 1 or any("Cross" in type(part).__name__ for part in found):
        raise UnsupportedModel(
            f"{type(block).__name__} attends more than once, or to other tokens than its own "
            f"({', '.join(type(part).__name__ for part in found)}); its cost is not known."
        )
    return found[0] if found else None


def attention_macs(module: nn.Module, top_k: int | None = None) -> AttentionMacs:
    """Count an attention module.

    Args:
        module: What :func:`find_attention` found.
        top_k: See :func:`token_macs`.

    Raises:
        UnsupportedModel: It is not one softmax over the keys that are stored.
    """
    other = [name for name in _OTHER if getattr(module, name, None) is not None]
    if other:
        raise UnsupportedModel(
            f"The cost of {type(module).__name__} is not known: with {', '.join(other)} it is not "
            f"one softmax over all stored keys."
        )
    out, whole = _output(module), token_macs(module, top_k)
    assert out is not None, "find_attention looks for it"
    values = linear(out)[0]
    if getattr(module, "kv_b_proj", None) is not None:
        return _latent(module, whole, values)
    fused = _part(module, _FUSED)
    if fused is not None:
        return AttentionMacs(whole, whole, 2 * values, cache=linear(fused)[1] - values)
    if getattr(module, "is_kv_shared_layer", False):
        # Keys and values are those of an earlier layer: projections that are there do not run.
        unused = [p for name in ("k_proj", "v_proj") if (p := getattr(module, name, None))]
        spared = sum(token_macs(part) for part in unused)
        return AttentionMacs(whole, whole - spared, 2 * values)
    return _apart(module, whole, values)


def _apart(module: nn.Module, whole: int, values: int) -> AttentionMacs:
    """Keys and values projected apart; each of their heads may serve several queries."""
    key_name, value_name = next(pair for pair in _APART if getattr(module, pair[0], None))
    keys = linear(getattr(module, key_name))[1]
    value: Any = getattr(module, value_name, None)
    stored = keys if value is None else linear(value)[1]  # Gemma 4: keys are the values too
    # values // stored query heads share a head of keys.
    pair = keys * values // stored + values
    return AttentionMacs(whole, whole, pair, cache=keys + stored)


def _latent(module: Any, whole: int, values: int) -> AttentionMacs:
    """Multi-head latent attention (DeepSeek): keys and values unfold from a narrow latent.

    Newer transformers store the latent and unfold all of it in every call, older ones store what
    came out of it.
    """
    query = module.q_proj if getattr(module, "q_b_proj", None) is None else module.q_b_proj
    queries = linear(query)[1]
    if not hasattr(module, "expand_kv"):
        return AttentionMacs(whole, whole, queries + values, cache=queries + values)
    unfold = token_macs(module.kv_b_proj)
    latent = linear(module.kv_a_proj_with_mqa)[1]
    return AttentionMacs(whole, whole - unfold, queries + values, key=unfold, cache=latent)


def _part(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    parts = dict(module.named_children())
    return next((parts[name] for name in names if name in parts), None)


def _output(module: nn.Module) -> nn.Module | None:
    return _part(module, _OUT)


def _inputs(module: nn.Module) -> nn.Module | None:
    keys = ("kv_b_proj", *_FUSED, *(key for key, _ in _APART))
    found = _part(module, keys)
    # A layer that reads an earlier layer's keys has queries alone.
    shared = getattr(module, "is_kv_shared_layer", False)
    return _part(module, ("q_proj",)) if found is None and shared else found
