# SPDX-License-Identifier: Apache-2.0
"""The stages of one method at the projector and before decoder layers; what layers are given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.hf.cache import CACHE_ARGUMENT
from visprune.backbones.vlm.base import VLMAdapter
from visprune.core.budget import Stage
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.choose import Observer
from visprune.machine.decoder.current import Current
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.images import Step
from visprune.machine.decoder.learned import LearnedModules
from visprune.machine.decoder.reading import LayerReader, timed
from visprune.machine.decoder.shorten import run_stage
from visprune.machine.plan import Plan

FORWARD = "visprune_forward"
"""The argument by which a call of the decoder reaches its layers."""


class StageHooks:
    """Runs stages where the plan has them, and gives each layer its own mask and positions.

    Args:
        adapter: the model family.
        plan: the stages.
        observers: whom to tell of every choice; read at each.
        learned: what the method brings to its stages.
        reader: what reads signals of the layers.
        current: the call that a thread is in.

    Attributes:
        thins: the layer from which on a method decides what of an answer is stored, and the method.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        plan: Plan,
        observers: Sequence[Observer],
        learned: LearnedModules,
        reader: LayerReader,
        current: Current,
    ) -> None:
        self._adapter, self._plan, self._observers = adapter, plan, observers
        self._learned, self._reader, self._current = learned, reader, current
        self.thins = _thinning(adapter, plan)

    def install(self) -> list[Any]:
        """Hook the layers; returns the handles."""
        return [
            layer.register_forward_pre_hook(partial(self._layer, number), with_kwargs=True)
            for number, layer in enumerate(self._adapter.layers)
        ]

    def at_projector(self, fwd: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run the stages before the decoder; returns its shorter input, ``[B, L', E]``."""
        for number, stage in self._plan.projector_stages:
            if number in self._plan.ahead:
                self._look_ahead(number, stage, fwd, hidden, kwargs)
            step, hidden = self._run(stage, number, fwd, hidden, self._shown(fwd, hidden))
            fwd.later = {layer: step(one) for layer, one in fwd.later.items()}
        return hidden

    def _look_ahead(
        self, number: int, stage: Stage, fwd: Forward, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Run the decoder as far as a stage before it wants to look."""
        first = fwd.first_pass()
        given = first.arguments(hidden, kwargs)
        given.update({CACHE_ARGUMENT: first.cache, FORWARD: first})
        if first.cache is None:
            given["use_cache"] = False
        # Not through the module itself, whose hooks are at work on the call.
        run = partial(self._adapter.language_model.forward, **given)
        self._current.forward = first
        try:
            with timed(fwd, self._observers):
                self._reader.ahead(self._plan.ahead[number], stage, fwd, first, run)
        finally:
            self._current.forward = fwd

    @torch.compiler.disable
    def _layer(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a decoder layer: its stage, then its own mask and positions."""
        if FORWARD not in kwargs:
            return None
        kwargs = dict(kwargs)
        fwd: Forward = kwargs.pop(FORWARD)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        rows = fwd.with_later(number, self._adapter.as_rows(hidden))
        places = dict(zip(self._adapter.layer_arguments, args, strict=False))
        if number in fwd.entered:
            # Older transformers run hooks again when gradient checkpointing recomputes a layer: it
            # is then given what it was given the first time.
            for step in fwd.entered[number].steps:
                rows = step(rows)
        else:
            rows = self._enter_layer(number, layer, fwd, rows, {**kwargs, **places})
        changed = fwd.entered[number].changed
        kwargs.update((name, value) for name, value in changed.items() if name not in places)
        args = tuple(changed.get(name, value) for name, value in places.items())
        return (self._adapter.as_states(rows), *args), kwargs

    def _enter_layer(
        self, number: int, layer: nn.Module, fwd: Forward, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Run the stages of a layer, and settle what it is given; returns its hidden states."""
        given = kwargs.get("position_embeddings")
        steps: list[Step] = []
        if fwd.images and not fwd.ahead:
            for order, stage in self._plan.decoder_stages.get(number, ()):
                self._reader.before(number, stage, layer, fwd, hidden, kwargs)
                step, hidden = self._run(stage, order, fwd, hidden, self._adapter.shown(hidden))
                steps.append(step)
            self._reader.states(number, fwd, self._adapter.shown(hidden))
        elif self.thins is not None and self.thins[0] == number and fwd.answers:
            states = self._adapter.shown(hidden)[:, -1]
            with torch.no_grad():
                fwd.thin(number, self.thins[1].stores(states, self._learned.modules))
        # Gaps in the ids look like packed sequences to FlashAttention.
        changed: dict[str, Any] = {"position_ids": None}
        if self._adapter.reads_positions and kwargs.get("position_ids") is not None:
            changed["position_ids"] = fwd.layer_positions(number, kwargs["position_ids"])
        if fwd.masks is not None or fwd.differs(number):
            changed["attention_mask"] = fwd.layer_mask(number, hidden)
        # A decoder may go on with the last row alone, which is all that a next token asks of it.
        last = hidden.shape[1] if hidden.shape[1] < fwd.table.num_slots else None
        if last is None and fwd.table is not fwd.first:
            by_token = {n: kwargs.get(n) for n in self._adapter.by_token}
            changed.update(fwd.by_token(by_token, fwd.rel))
        if fwd.differs(number) and given is not None and (last is None or fwd.compact):
            changed["position_embeddings"] = fwd.rotary(number, hidden, given)
        if last is not None:
            fwd.keep_last(last, changed)
        fwd.enter(number, steps, changed)
        return hidden

    def _shown(self, fwd: Forward, hidden: Tensor) -> Tensor:
        """What a stage at the projector chooses by: the features, where placeholders wait empty."""
        if not self._adapter.starts_empty or not fwd.later:
            return hidden
        return hidden + fwd.later[min(fwd.later)].to(hidden.device, hidden.dtype)

    def _run(
        self,
        stage: Stage,
        number: int,
        fwd: Forward,
        hidden: Tensor,
        shown: Tensor | None = None,
    ) -> tuple[Step, Tensor]:
        """Run a stage; returns what shortens hidden states, and these ones shortened.

        ``shown``: what it chooses by, if that is not ``hidden`` itself.
        """
        shown = hidden if shown is None else shown
        with timed(fwd, self._observers):
            act = self._plan.acts[number]
            step = run_stage(act, stage, fwd, shown, self._observers, self._learned.of(act))
            return step, step(hidden)


def _thinning(adapter: VLMAdapter, plan: Plan) -> tuple[int, PruningMethod] | None:
    """The layer from which on a method decides what of an answer is stored, and the method.

    Raises:
        UnsupportedModel: later layers carry a state, which every token goes through.
        ConfigError: a member of the chain evicts from the cache, whose heads then differ.
    """
    for layer, stages in plan.decoder_stages.items():
        for number, _ in stages:
            method = plan.acts[number].method
            if not method.thins_answers:
                continue
            if any(other >= layer for other in adapter.recurrent):
                raise UnsupportedModel(
                    f"{method.name} leaves generated tokens out of the cache, and recurrent "
                    f"layers of {adapter.config.model_type} take all of them in. Pass "
                    f"text=False."
                )
            if plan.cache is not None:
                raise ConfigError(
                    f"{method.name} leaves generated tokens out of a cache from which another "
                    f"method evicts. Pass text=False."
                )
            return layer, method
    return None
