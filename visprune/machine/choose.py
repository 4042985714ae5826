# SPDX-License-Identifier: Apache-2.0
"""Let a method choose: the one place where a budget, tokens and signals become a selection.

Tensors in, a selection out: no hook, no model and no site is known here, so whoever has tokens can
ask: the projector, the decoder, an image encoder, a cache, a server that has its own models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from visprune.core.budget import Stage
from visprune.core.method import Context, PruningMethod
from visprune.core.selection import Selection
from visprune.core.site import Site
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError

Observer = Callable[[Site, VisualTokens, Context, Selection, float], None]


def choose(
    method: PruningMethod,
    stage: Stage,
    tokens: VisualTokens,
    context: Context,
    observers: Sequence[Observer] = (),
) -> Selection:
    """Let a stage of a method choose from tokens.

    Args:
        method: the method.
        stage: its stage; the budget says how many tokens stay of ``context.original``.
        tokens: of B images of one count, ``[B, N, D]``.
        context: what the stage is shown; ``num_keep`` and ``site`` are filled in here.
        observers: called with (site, tokens, context, selection, seconds of ``select``).

    Returns:
        The selection, with its ``size`` and the ``macs`` that the rule spent on each image.

    Raises:
        BudgetError: the method is strict, and the budget exceeds the image's tokens.
        ConfigError: the method returned a selection of other tokens.
    """
    batch, count = tokens.features.shape[:2]
    original = context.original or count
    keep = 0
    if stage.budget is not None:
        keep = stage.budget.resolve(count, original, strict=method.strict)
    shown = Context(
        num_keep=keep,
        site=stage.site,
        stage=context.stage,
        signals=context.signals,
        original=original,
        layer=context.layer,
        num_layers=context.num_layers,
        prefix=context.prefix,
        learned=context.learned,
        carried=context.carried,
    )
    seconds, timed = 0.0, bool(observers)
    if timed:
        seconds = -now(tokens.features.device)
    selection = method.select(tokens, shown)
    if timed:
        seconds += now(tokens.features.device)
    if selection.num_tokens != count or selection.index.shape[0] != batch:
        raise ConfigError(
            f"{method.name} was given {batch} x {count} tokens and returned a selection of "
            f"{selection.index.shape[0]} x {selection.num_tokens}."
        )
    macs = method.macs(count, keep, tokens.features.shape[-1])
    selection = selection.chosen(tokens.size, macs)
    for observer in observers:
        observer(stage.site, tokens, shown, selection, seconds)
    return selection


def now(device: torch.device) -> float:
    """The clock, once the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
