# SPDX-License-Identifier: Apache-2.0
"""Price what a run did, from the tokens that really entered each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from visprune.cost import Causal, Cost, sample_cost
from visprune.errors import ConfigError

if TYPE_CHECKING:
    from visprune.apply import Run


def run_cost(
    run: Run,
    inputs: Mapping[str, Any] | None = None,
    *,
    new_tokens: int = 0,
    causal: Causal = "ideal",
) -> Cost:
    """Multiply-adds by part (vision, projector, selection, prefill, lm_head, decode) and KV bytes.

    Args:
        run: a run in force.
        inputs: what the model takes; one prefill is run with it (and becomes ``run.trace``).
            ``None``: price the last prefill of the run.
        new_tokens: tokens generated after the prompt.
        causal: ``"ideal"`` counts the visible half of causal attention, ``"dense"`` all of it.

    Returns:
        The cost of the whole batch, padding not counted in operations (no sample owns it) but
        counted in ``kv_bytes`` (it is stored). ``cost.per_sample()`` is the mean.

    Raises:
        ConfigError: nothing with a picture has run yet, or ``inputs`` holds none.
    """
    if inputs is not None:
        if not run.owner.active:
            raise ConfigError("This run was removed; price inputs while it is in force.")
        run.trace.tokens_per_layer = []
        with torch.no_grad():
            run.adapter.model(**inputs, logits_to_keep=1)
    trace = run.trace
    if not trace.tokens_per_layer:
        raise ConfigError(
            "There is nothing to price: no prompt with a picture has run. Pass inputs, or call the "
            "model first."
        )
    shape = run.adapter.cost_shape()
    dtype = next(run.adapter.language_model.parameters()).dtype
    samples = len(trace.tokens_per_layer)
    parts = []
    for row in range(samples):
        images = [i for i, owner in enumerate(trace.image_rows) if owner == row]
        share = trace.selection_macs // samples
        if row == 0:
            share += trace.selection_macs % samples
        parts.append(
            sample_cost(
                shape,
                tokens_per_layer=trace.sequence_per_layer[row],
                stored_per_layer=trace.stored_per_layer[row],
                cached=trace.cached_per_layer[row],
                grids=[grid for i in images for grid in trace.grids[i]],
                dtype=dtype,
                decode_steps=max(0, new_tokens - 1),
                selection=share,
                causal=causal,
            )
        )
    return sum(parts, start=Cost(samples=0))
