# SPDX-License-Identifier: Apache-2.0
"""Price a vision transformer under a method, from the tokens that enter each layer's parts."""

from __future__ import annotations

import math

from visprune.backbones.encoders.base import EncoderAdapter
from visprune.core.budget import Stage
from visprune.core.method import PruningMethod
from visprune.core.signals import EncoderKeys, EncoderSignal
from visprune.cost.cost import Cost
from visprune.machine.encoder.plan import EncoderPlan, length_after


def encoder_cost(
    adapter: EncoderAdapter,
    method: PruningMethod,
    plan: EncoderPlan,
    grid: tuple[int, ...],
    *,
    samples: int = 1,
    upto: int | None = None,
) -> Cost:
    """Multiply-adds of ``samples`` pictures of ``grid`` patches.

    A layer costs its attention's projections for the tokens that enter it, both products of its
    attention, and its MLP for those left after it. Embedding, pooling and head are in ``vision``;
    what the method computes to choose is in ``selection``.

    Args:
        adapter: the encoder.
        method: the method.
        plan: its stages.
        grid: patches along height and width, of clips along time first.
        samples: pictures.
        upto: layers that run; ``None``: all.
    """
    total = math.prod(grid)
    counts = plan.counts(total, len(adapter.layers))
    vision = adapter.fixed_macs(grid, plan.leaving(total, len(adapter.layers) - 1))
    for layer, (before, after) in zip(adapter.layers[:upto], counts, strict=False):
        tokens = before + adapter.prefix
        vision += layer.cost.macs(tokens, tokens * tokens, after + adapter.prefix)
    selection = selection_macs(adapter, method, plan, grid, upto=upto)
    return Cost(vision=samples * vision, selection=samples * selection, samples=samples)


def selection_macs(
    adapter: EncoderAdapter,
    method: PruningMethod,
    plan: EncoderPlan,
    grid: tuple[int, ...],
    *,
    upto: int | None = None,
) -> int:
    """What the method itself computes on one picture, see :func:`encoder_cost`."""
    total = math.prod(grid)
    spent, left = 0, total
    for number in range(len(adapter.layers))[:upto]:
        for _, stage in plan.at(number):
            entering, left = left, length_after(stage, left, total)
            spent += _stage_macs(adapter, method, stage, number, entering, left)
    return spent


def _stage_macs(
    adapter: EncoderAdapter, method: PruningMethod, stage: Stage, number: int, count: int, keep: int
) -> int:
    """What one stage spends on one picture: its signals, and the method's own rule."""
    layer, tokens = adapter.layers[number], count + adapter.prefix
    signals = [s for s in stage.signals if isinstance(s, EncoderSignal)]
    attending = [signal for signal in signals if signal.uses == "attention"]
    every = any(signal.every for signal in attending)
    spent = adapter.signal_macs(tokens, every=every) if attending else 0
    spent += sum(signal.macs(tokens, layer.attention_width) for signal in signals)
    keyed = any(isinstance(signal, EncoderKeys) for signal in signals)
    return spent + method.macs(count, keep, layer.head_width if keyed else adapter.width)
