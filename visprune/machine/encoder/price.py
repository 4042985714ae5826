# SPDX-License-Identifier: Apache-2.0
"""Price a vision transformer under a method, from the tokens that enter each layer's parts."""

from __future__ import annotations

from visprune.backbones.encoders.base import EncoderAdapter
from visprune.core.budget import Stage
from visprune.core.method import PruningMethod
from visprune.core.signals import EncoderKeys, EncoderSignal
from visprune.cost.cost import Cost
from visprune.machine.encoder.plan import EncoderPlan


def encoder_cost(
    adapter: EncoderAdapter,
    method: PruningMethod,
    plan: EncoderPlan,
    grid: tuple[int, int],
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
        grid: patches along height and width.
        samples: pictures.
        upto: layers that run; ``None``: all.
    """
    total = grid[0] * grid[1]
    layers = adapter.layers[:upto]
    vision = selection = 0
    counts = plan.counts(total, len(adapter.layers))
    for number, (layer, (before, after)) in enumerate(zip(layers, counts, strict=False)):
        tokens = before + adapter.prefix
        vision += tokens * layer.attention_weights + (after + adapter.prefix) * layer.mlp_weights
        vision += 2 * tokens * tokens * layer.attention_width
        entering = counts[number - 1][1] if number else total
        for _, stage in plan.entry.get(number, ()):
            selection += _stage_macs(adapter, method, stage, number, entering, before)
        for _, stage in plan.inside.get(number, ()):
            selection += _stage_macs(adapter, method, stage, number, before, after)
    vision += adapter.fixed_macs(grid, counts[-1][1] if counts else total)
    return Cost(vision=samples * vision, selection=samples * selection, samples=samples)


def _stage_macs(
    adapter: EncoderAdapter, method: PruningMethod, stage: Stage, number: int, count: int, keep: int
) -> int:
    """What one stage spends on one picture: its signals, and the method's own rule."""
    layer, tokens = adapter.layers[number], count + adapter.prefix
    signals = [s for s in stage.signals if isinstance(s, EncoderSignal)]
    spent = adapter.signal_macs(tokens) if signals else 0
    spent += sum(signal.macs(tokens, layer.attention_width) for signal in signals)
    keyed = any(isinstance(signal, EncoderKeys) for signal in signals)
    return spent + method.macs(count, keep, layer.head_width if keyed else adapter.width)
