# SPDX-License-Identifier: Apache-2.0
"""Prompts made of a prompt: longer ones, and a batch in which it is padded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.base import VLMAdapter
from visprune.errors import ConfigError

Inputs = dict[str, Any]

# What says how to run, and not what is asked.
_NO_PART = (
    *("labels", "use_cache", "past_key_values", "cache", "cache_position", "return_dict"),
    *("output_attentions", "output_hidden_states", "logits_to_keep", "prompt_length"),
)


def prompt_of(adapter: VLMAdapter, given: Mapping[str, Any]) -> Inputs:
    """The prompt among the arguments of a ``forward`` or a ``generate``.

    Raises:
        ConfigError: there are no ``input_ids``.
    """
    core = adapter.core
    takers = [adapter.model.forward, core.forward, *(
        encode
        for kind in ("image", "video")
        if (encode := getattr(core, f"get_{kind}_features", None)) is not None
    )]  # fmt: skip
    named = {name for taker in takers for name in inspect.signature(taker).parameters}
    prompt = {
        key: value
        for key, value in given.items()
        if value is not None and key in named and key not in _NO_PART
    }
    if "input_ids" not in prompt and isinstance(given.get("inputs"), Tensor):
        prompt["input_ids"] = given["inputs"]
    if not isinstance(prompt.get("input_ids"), Tensor):
        raise ConfigError(
            "A check takes what the model takes: input_ids with a picture's placeholders and its "
            "pixels, as the processor returns them."
        )
    return {"attention_mask": torch.ones_like(prompt["input_ids"]), **prompt}


def pictured(given: Mapping[str, Any]) -> bool:
    """Whether a call holds pictures that are not encoded yet."""
    return any("pixel" in key and value is not None for key, value in given.items())


def by_token(inputs: Inputs) -> list[str]:
    """Names of what has one number a token, ``[B, S]``."""
    shape = inputs["input_ids"].shape
    return [k for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == shape]


def extended(inputs: Inputs, tokens: Tensor, types: Mapping[str, int] | None = None) -> Inputs:
    """The inputs with text ``tokens`` ``[B, T]`` appended, whose types are ``types`` (or 0)."""
    fill = {"attention_mask": 1, **(types or {})}
    out = dict(inputs)
    for name in by_token(inputs):
        if name == "input_ids":
            more = tokens
        else:  # a mask says that they are there, types that they are text
            more = torch.full_like(tokens, fill.get(name, 0))
        out[name] = torch.cat([inputs[name], more.to(inputs[name])], 1)
    return out


def padded(inputs: Inputs, count: int, token: int) -> Inputs:
    """The inputs with ``count`` tokens of padding in front."""
    out = dict(inputs)
    for name in by_token(inputs):
        fill = token if name == "input_ids" else 0
        out[name] = torch.nn.functional.pad(inputs[name], (count, 0), value=fill)
    return out


def together(first: Inputs, second: Inputs, packed: Mapping[str, int]) -> Inputs:
    """Two prompts of one length and of pictures of one size as one batch.

    Args:
        first: what the model takes of one.
        second: of the other.
        packed: what is put together along another axis than the first, by name.
    """
    out: Inputs = {}
    for name, value in first.items():
        other = second[name]
        if isinstance(value, Tensor) and value.dim():
            out[name] = torch.cat([value, other], packed.get(name, 0))
        elif isinstance(value, list | tuple):
            out[name] = [*value, *other]
        else:
            out[name] = value
    return out


def special_ids(adapter: VLMAdapter) -> list[int]:
    """Tokens that stand for something else than text: ids that the configs name."""
    found: set[int] = set()
    for config in (adapter.config, adapter.text_config):
        for name, value in vars(config).items():
            if "token" in name and name.endswith(("_id", "_ids", "_index")):
                values = value if isinstance(value, list | tuple) else [value]
                found.update(v for v in values if isinstance(v, int) and not isinstance(v, bool))
    found.update(i for i in (adapter.token_id("image"), adapter.token_id("video")) if i is not None)
    rows = adapter.model.get_input_embeddings().num_embeddings
    return sorted(i for i in found if 0 <= i < rows)
