# SPDX-License-Identifier: Apache-2.0
"""Read the signals of decoder layers: in the layer before a stage, or ahead of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import CACHE_ARGUMENT, stored_length
from visprune.backbones.hf.probe import (
    Attended,
    Wanted,
    capture,
    projecting_once,
    watch,
    without_values,
)
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout
from visprune.core.budget import Stage
from visprune.core.signals.base import DecoderSeen, DecoderSignal
from visprune.core.threads import PerThread
from visprune.errors import ConfigError
from visprune.machine.choose import Observer, now
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.shorten import read_layer, seen_by
from visprune.machine.plan import Plan


class _Ahead(PerThread):
    """The layer whose queries and keys are read ahead of its run, and who is shown them."""

    own: tuple[int, Callable[[Attended], None]] | None = None


class LayerReader:
    """Shows a method's stages what the decoder's layers attend to.

    Args:
        adapter: the model family.
        plan: which signals are read where.
        observers: whom the time of reading is counted for.
        current: the forward that is under way in this thread.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        plan: Plan,
        observers: Sequence[Observer],
        current: Callable[[], Forward | None],
    ) -> None:
        self._adapter, self._plan, self._observers = adapter, plan, observers
        self._current, self._ahead = current, _Ahead()

    def install(self) -> list[Any]:
        """Watch the attention of the layers that a signal reads; returns what undoes it."""
        return [
            watch(self._adapter.attention(number), partial(self._wanted, number))
            for number in self._plan.watched
        ]

    def before(
        self,
        number: int,
        stage: Stage,
        layer: Any,
        fwd: Forward,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Read what the stage of a layer asks of that layer, before it chooses."""
        if number in self._plan.own:
            with timed(fwd, self._observers):
                self._read_own(number, stage, layer, fwd, hidden, kwargs)

    def ahead(
        self, number: int, stage: Stage, fwd: Forward, first: Forward, run: Callable[[], Any]
    ) -> None:
        """Read what a stage before the decoder asks of one of its layers, in a first pass.

        Args:
            number: the layer.
            stage: whose signals.
            fwd: the call.
            first: its first pass.
            run: runs that; it ends at the layer.
        """

        def record(attended: Attended) -> None:
            seen = seen_by(first, attended.query[:, 0], number)
            _show(seen, attended, attended.key.shape[2] - first.table.num_slots)
            read_layer([stage], fwd, seen, "ahead")

        self._ahead.own = (number, record)
        try:
            with torch.no_grad():
                capture(run)
        finally:
            self._ahead.own = None
        tokens = fwd.table.valid.sum(1).tolist()
        fwd.trace.ahead.append((number, tokens))
        self._spend_projections(number, fwd, tokens)

    def states(self, number: int, fwd: Forward, hidden: Tensor) -> None:
        """Read what later stages ask of the states that a layer works on."""
        if number in self._plan.states:
            read_layer(self._plan.states[number], fwd, seen_by(fwd, hidden, number), "states")

    def inputs(self, fwd: Forward, hidden: Tensor) -> None:
        """Read what stages ask of the states that enter the first layer."""
        if self._plan.inputs:
            with timed(fwd, self._observers):
                read_layer(self._plan.inputs, fwd, seen_by(fwd, hidden, 0), "input")

    @torch.compiler.disable
    def _wanted(self, number: int) -> Wanted | None:
        """What is wanted of a call of the attention of a layer."""
        own = self._ahead.own
        if own is not None and own[0] == number:
            return Wanted(own[1], stop=True)
        fwd = self._current()
        stages = self._plan.previous.get(number)
        if fwd is None or not fwd.images or not stages:
            return None
        return Wanted(partial(self._read_previous, number, stages, fwd))

    def _read_previous(
        self, number: int, stages: list[Stage], fwd: Forward, attended: Attended
    ) -> None:
        # What entered the layer is not known here, and no signal that reads attention asks for it.
        seen = seen_by(fwd, attended.query[:, 0], number)
        _show(seen, attended, attended.key.shape[2] - fwd.table.num_slots)
        with timed(fwd, self._observers):
            read_layer(stages, fwd, seen, "attention")

    def _read_own(
        self,
        number: int,
        stage: Stage,
        layer: Any,
        fwd: Forward,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Read what a layer is about to attend to, from its own projections."""
        given, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        own = [
            s
            for s in stage.signals
            if isinstance(s, DecoderSignal) and s.layer == "own" and s.uses == "attention"
        ]
        passes = sorted({s.unrotated for s in own})
        attention, thin = self._adapter.attention(number), None
        if not any(s.reads_values for s in own):
            thin = without_values(attention)
        values = thin is None
        attention = attention if thin is None else thin
        once = projecting_once(attention) if len(passes) > 1 else None
        states = self._adapter.layer_input(layer, hidden)
        for unrotated in passes:
            rotary = fwd.rotary(number, hidden, given)
            more = self._adapter.attention_arguments(number)
            if self._adapter.reads_positions and positions is not None:
                more["position_ids"] = fwd.layer_positions(number, positions)
            if unrotated:
                rotary = (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))
            mine = tuple(s for s in own if s.unrotated == unrotated)
            only = Stage(stage.site, stage.budget, mine)
            show = partial(self._record_own, number, only, fwd, hidden, values)
            self._ahead.own = (number, show)
            try:
                with torch.no_grad():
                    capture(
                        attention if once is None else once,
                        hidden_states=states,
                        attention_mask=None,
                        position_embeddings=rotary,
                        **{CACHE_ARGUMENT: None},
                        **more,
                    )
            finally:
                self._ahead.own = None
            if once is None or unrotated is passes[0]:
                self._spend_projections(number, fwd, fwd.table.valid.sum(1).tolist(), values)

    def _spend_projections(
        self, number: int, fwd: Forward, tokens: list[int], values: bool = True
    ) -> None:
        """Count queries, keys and values that a layer computed to be looked at."""
        each = self._adapter.qk_macs(number, values=values)
        for row, count in enumerate(tokens):
            fwd.trace.spend(row, count * each)

    def _record_own(
        self,
        number: int,
        stage: Stage,
        fwd: Forward,
        hidden: Tensor,
        values: bool,
        attended: Attended,
    ) -> None:
        stored = stored_length(fwd.cache, number)
        if stored and fwd.cache is not None:
            old = fwd.cache.layers[number]
            attended.key = torch.cat([old.keys.to(attended.key), attended.key], dim=2)
            attended.value = torch.cat([old.values.to(attended.value), attended.value], dim=2)
        seen = seen_by(fwd, hidden, number)
        _show(seen, attended, stored)
        if not values:
            seen.value = None
        read_layer([stage], fwd, seen, "attention")


@contextmanager
def timed(fwd: Forward, observers: Sequence[Observer]) -> Iterator[None]:
    """Add to what choosing took in a forward, if anyone observes it."""
    if not observers:
        yield
        return
    begin = now(fwd.device)
    try:
        yield
    finally:
        fwd.trace.selection_seconds += now(fwd.device) - begin


def _show(seen: DecoderSeen, attended: Attended, stored: int) -> None:
    seen.query, seen.key, seen.value = attended.query, attended.key, attended.value
    seen.scale, seen.softcap, seen.stored = attended.scale, attended.softcap, stored


def check_signals(plan: Plan, method: str, layout: ImageLayout) -> None:
    """Refuse a picture that was encoded without what stages read of the encoder.

    Raises:
        ConfigError: a signal is missing.
    """
    known = layout.picture.signals
    missing = [s for s in plan.required if s not in known]
    if missing:
        raise ConfigError(
            f"{method} reads {missing[0]} of the image encoder, which these "
            f"features were encoded without. Encode them with visprune.encode_images(model, "
            f"methods=[...]), or inside the run."
        )
