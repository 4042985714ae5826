# SPDX-License-Identifier: Apache-2.0
"""The untouched model with tokens hidden as keys: what every pruned model must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune.machine.decoder.hooks
from visprune.machine.decoder.forward import Forward

TOLERANCE = 1e-5


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the scale of what is wanted.

    Words that a model never writes (Chameleon: codes of pictures) have the lowest number there is.
    """
    if want.is_floating_point():
        never = want == torch.finfo(want.dtype).min
        assert torch.equal(got == torch.finfo(got.dtype).min, never)
        got, want = got.masked_fill(never, 0.0), want.masked_fill(never, 0.0)
    scale = max(1.0, float(want.abs().max()))
    return float((got.double() - want.double()).abs().max()) / scale


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all())
    assert error(got, want) <= TOLERANCE


@contextmanager
def forwards() -> Iterator[list[Forward]]:
    """Collect the state of every forward that holds pictures."""
    found: list[Forward] = []

    class Noted(Forward):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.images:
                found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visprune.machine.decoder.hooks, "Forward", Noted)
        yield found


def alive(forward: Forward) -> list[Tensor]:
    """Which input tokens each decoder layer worked on, ``[B, S]`` bool per layer."""
    layers = len(forward.adapter.layers)
    return [forward.entered[number].table.kept() for number in range(layers)]


def visible_keys(keep: Tensor, valid: Tensor, extra: Tensor | None = None) -> Tensor:
    """Additive ``[B, 1, S, S]``: causal, without hidden keys; a hidden token sees itself alone."""
    length = keep.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & (keep & valid)[:, None, :]
    if extra is not None:
        seen = seen & extra  # [B, S, S]: what the user hides besides
    seen = seen | torch.eye(length, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def closed_up(ids: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """Position ids without gaps: each minus the dropped tokens before it."""
    gone = (valid & ~keep).long()
    return ids - (gone.cumsum(1) - gone)


@contextmanager
def hiding(
    model: Any,
    keep: list[Tensor],
    valid: Tensor,
    *,
    compact: bool = False,
    extra: Tensor | None = None,
) -> Iterator[None]:
    """Run ``model`` with the tokens that ``keep`` lacks hidden as keys, layer by layer."""
    decoder = model.model.language_model

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {**kwargs, "attention_mask": visible_keys(keep[number], valid, extra)}
        if compact:
            hidden = args[0] if args else kwargs["hidden_states"]
            ids = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
            ids = closed_up(ids, keep[number], valid)
            kwargs["position_embeddings"] = decoder.rotary_emb(hidden, position_ids=ids)
        return args, kwargs

    with ExitStack() as stack:
        for number, layer in enumerate(decoder.layers):
            hook = partial(before, number)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def hidden_logits(
    model: Any,
    inputs: dict[str, Any],
    keep: list[Tensor],
    *,
    compact: bool = False,
    extra: Tensor | None = None,
) -> Tensor:
    """Logits ``[B, S, V]`` of the untouched model with hidden keys (no cache)."""
    valid = inputs["attention_mask"].bool()
    with hiding(model, keep, valid, compact=compact, extra=extra), torch.no_grad():
        return model(**inputs, use_cache=False).logits


def extended(inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """The inputs with text ``tokens`` ``[B, T]`` appended."""
    ones = torch.ones_like(tokens)
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    out["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat(
            [types, torch.zeros_like(tokens, dtype=types.dtype)], 1
        )
    return out


def grown(keep: list[Tensor], length: int) -> list[Tensor]:
    """``keep`` for a longer sequence: what came later is there."""
    return [torch.nn.functional.pad(one, (0, length - one.shape[1]), value=True) for one in keep]


def step(model: Any, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """What a plain forward takes to continue from a cache of ``inputs`` with text ``tokens``."""
    longer = extended(inputs, tokens)
    out = {"input_ids": tokens, "attention_mask": longer["attention_mask"]}
    deltas = getattr(model.model, "rope_deltas", None)
    if deltas is not None:
        # Qwen's own forward counts the positions of the whole mask here and then cannot use them.
        ids = (out["attention_mask"].cumsum(1) - 1)[:, -tokens.shape[1] :] + deltas
        out["position_ids"] = ids.expand(3, -1, -1)
    return out
