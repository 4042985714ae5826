# SPDX-License-Identifier: Apache-2.0
"""Price what a run did, from the tokens that really entered each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from visprune.backbones.encoders.base import EncoderAdapter
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout
from visprune.core.method import PruningMethod
from visprune.core.site import Site
from visprune.core.trace import Trace
from visprune.cost.cost import (
    Causal,
    Cost,
    ModelShape,
    packed_macs,
    prefill_macs,
    projected_tokens,
    sample_cost,
    vision_macs,
)
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.encoder.patches import PatchReduction
from visprune.machine.encoder.plan import EncoderPlan
from visprune.machine.encoder.price import encoder_cost
from visprune.machine.encoder.state import EncoderPass
from visprune.machine.encoder.within_vlm import EncoderReduction


class Priced(Protocol):
    """What is read of a run."""

    adapter: Any
    encoder: EncoderReduction | PatchReduction | None

    @property
    def trace(self) -> Trace:
        """What happened in its last forward."""


def run_cost(
    run: Priced,
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
        run.trace.tokens_per_layer = []
        with torch.no_grad():
            run.adapter.model(**inputs, **({} if run.adapter.heads_all else {"logits_to_keep": 1}))
    counts = [new_tokens] * len(run.trace.tokens_per_layer)
    return sum(sample_costs(run, new_tokens=counts, causal=causal, padded=True), Cost(samples=0))


def sample_costs(
    run: Priced,
    *,
    new_tokens: Sequence[int],
    causal: Causal = "ideal",
    padded: bool = False,
    shape: ModelShape | None = None,
) -> list[Cost]:
    """Price each sample of the last prefill of a run.

    Args:
        run: a run.
        new_tokens: tokens that each sample generated.
        causal: see :func:`run_cost`.
        padded: count the padding of the batch in what is stored; without, each sample is priced as
            if it had been alone.
        shape: of the model; ``None``: read from its modules, which takes as long as a small
            model's answer.

    Raises:
        ConfigError: nothing with a picture has run yet, or the lengths differ.
        UnsupportedModel: what the model costs is not known, or not behind this method.
    """
    trace = run.trace
    if not trace.tokens_per_layer:
        raise ConfigError(
            "There is nothing to price: no prompt with a picture has run. Pass inputs, or call the "
            "model first."
        )
    if run.adapter.before_layers and any(x["site"] == str(Site.decoder(0)) for x in trace.stages):
        raise UnsupportedModel(
            f"This {run.adapter.config.model_type} projects tokens before its first layer, where "
            f"those are there that left on entering layer 0: what it cost is not counted. Choose "
            f"a later layer."
        )
    shape = run.adapter.cost_shape() if shape is None else shape
    dtype = next(run.adapter.language_model.parameters()).dtype
    samples = len(trace.tokens_per_layer)
    _check_lengths(new_tokens, samples)
    counts = each = leaving = None
    if isinstance(run.encoder, EncoderReduction):
        counts = run.encoder.counts()
        leaving = run.encoder.leaving(len(counts) - 1)
        if run.adapter.whole_from == "projector":
            each = run.encoder.leaving(run.adapter.encoder_end) + run.adapter.keeps_cls
    costs = []
    for row in range(samples):
        images = [i for i, owner in enumerate(trace.image_rows) if owner == row]
        spent = trace.selection_per_row[row] if row < len(trace.selection_per_row) else 0
        sequence, cached = trace.sequence_per_layer[row], trace.cached_per_layer[row]
        for layers, tokens in trace.ahead:
            first = [tokens[row]] * layers + [0] * (len(sequence) - layers)
            spent += prefill_macs(shape.decoder, first, causal=causal, cached=cached)
        stored = trace.stored_per_layer[row]
        if not padded:
            alone = [new + old for new, old in zip(sequence, cached, strict=True)]
            stored = [min(pair) for pair in zip(stored, alone, strict=True)]
        if trace.cache is not None:  # a head's own slots, to the nearest whole mean
            stored = [round(mean) for mean in trace.cache.mean_slots(row)]
        grids = [grid for i in images for grid in trace.grids[i]]
        encoded = [(trace.encoded[i], trace.grids[i]) for i in images]
        projected = _projected(shape, [(trace.projected[i], trace.grids[i]) for i in images])
        cost = sample_cost(
            shape,
            vision=_encoder_macs(shape, encoded, counts, leaving),
            projected=projected if each is None else each * sum(t for t, _, _ in grids),
            tokens_per_layer=sequence,
            stored_per_layer=stored,
            cached=cached,
            grids=grids,
            dtype=dtype,
            head_rows=sequence[-1] if run.adapter.heads_all else 1,
            decode_steps=max(0, new_tokens[row] - 1),
            selection=spent,
            causal=causal,
        )
        if trace.cache is not None:
            cost = replace(cost, kv_bytes=trace.cache.bytes_of(row))
        costs.append(cost)
    return costs


def prompt_costs(
    adapter: VLMAdapter,
    inputs: Mapping[str, Any],
    layouts: Sequence[ImageLayout],
    *,
    new_tokens: Sequence[int],
    causal: Causal = "ideal",
    shape: ModelShape | None = None,
) -> list[Cost]:
    """Price prompts under the untouched model, each sample as if it had been alone.

    Args:
        adapter: of the model.
        inputs: what the model takes: ``input_ids`` with a placeholder for every visual token, and
            ``attention_mask`` where the batch is padded.
        layouts: the pictures among them (``adapter.layouts``); none: a text prompt.
        new_tokens: tokens that each sample generates.
        causal: see :func:`run_cost`.
        shape: see :func:`sample_costs`.

    Raises:
        ConfigError: the lengths differ.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    _check_lengths(new_tokens, len(lengths))
    shape = adapter.cost_shape() if shape is None else shape
    dtype = next(adapter.language_model.parameters()).dtype
    return [
        sample_cost(
            shape,
            tokens_per_layer=int(length),
            vision=_encoder_macs(shape, [(x.picture.encoded, x.picture.grids) for x in own]),
            projected=_projected(shape, [(x.picture.projected, x.picture.grids) for x in own]),
            grids=[grid for x in own for grid in x.picture.grids],
            dtype=dtype,
            head_rows=int(length) if adapter.heads_all else 1,
            decode_steps=max(0, new_tokens[row] - 1),
            causal=causal,
        )
        for row, length in enumerate(lengths)
        for own in [[x for x in layouts if x.row == row]]
    ]


# (t, h, w) of each grid.
_Grids = Sequence[tuple[int, int, int]]


def _encoder_macs(
    shape: ModelShape,
    pictures: Iterable[tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, _Grids]],
    counts: Sequence[tuple[int, int]] | None = None,
    leaving: int | None = None,
) -> int:
    """The image encoder's, of pictures by the patches that it was given, or else by their grids."""
    macs = 0
    whole: list[tuple[int, int, int]] = []
    for given, grids in pictures:
        if given is None:
            whole += grids
        else:
            macs += packed_macs(shape.vision, *given)
    return macs + vision_macs(shape.vision, whole, counts, leaving)


def _projected(shape: ModelShape, pictures: Iterable[tuple[int | None, _Grids]]) -> int:
    """Tokens that leave the projector: as pictures say, or else those of their grids."""
    return sum(
        projected_tokens(shape.projector, grids) if told is None else told
        for told, grids in pictures
    )


def vit_cost(
    adapter: EncoderAdapter, method: PruningMethod, plan: EncoderPlan, latest: EncoderPass | None
) -> Cost:
    """Multiply-adds of a vision transformer's last forward, or of one picture of its own size."""
    if latest is None or not latest.layers:
        return encoder_cost(adapter, method, plan, adapter.default_grid())
    each = [
        encoder_cost(adapter, method, plan, grid, samples=number)
        for grid, number in Counter(latest.grids).items()
    ]
    return sum(each[1:], each[0])


def _check_lengths(new_tokens: Sequence[int], samples: int) -> None:
    if len(new_tokens) != samples:
        raise ConfigError(
            f"new_tokens has one count for each of the {samples} samples, got {len(new_tokens)}."
        )
