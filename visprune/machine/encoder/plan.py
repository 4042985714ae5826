# SPDX-License-Identifier: Apache-2.0
"""Where a method acts inside one image encoder, resolved and checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from visprune.core.budget import Stage
from visprune.core.method import ModelSpec, PruningMethod
from visprune.core.signals.base import DecoderSignal, EncoderSignal, TokenSignal
from visprune.errors import ConfigError

Numbered = tuple[int, Stage]


@dataclass
class EncoderPlan:
    """The stages inside an encoder, by 0-based layer; each with its number in the schedule.

    Attributes:
        entry: run on entering a layer.
        inside: run between a layer's attention and its MLP.
    """

    entry: dict[int, list[Numbered]] = field(default_factory=dict)
    inside: dict[int, list[Numbered]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entry or self.inside)

    def at(self, layer: int) -> list[Numbered]:
        """All stages of a layer."""
        return [*self.entry.get(layer, ()), *self.inside.get(layer, ())]

    def counts(self, total: int, layers: int) -> list[tuple[int, int]]:
        """Patches that enter the attention and the MLP of each layer, of ``total``."""
        found, left = [], total
        for layer in range(layers):
            for _, stage in self.entry.get(layer, ()):
                left = length_after(stage, left, total)
            before = left
            for _, stage in self.inside.get(layer, ()):
                left = length_after(stage, left, total)
            found.append((before, left))
        return found


def step(stage: Stage, entering: int, original: int) -> int:
    """Tokens of one picture that a stage leaves of those that enter it."""
    if stage.budget is None:
        raise ConfigError(f"A stage at {stage.site} needs a budget.")
    return stage.budget.resolve(entering, original)


def length_after(stage: Stage, entering: int, original: int) -> int:
    """Tokens of one picture after a stage, with those that it makes of the ones that leave."""
    if stage.budget is None:
        raise ConfigError(f"A stage at {stage.site} needs a budget.")
    return stage.budget.slots(entering, original)


def make_encoder_plan(
    method: PruningMethod, numbered: Iterable[Numbered], spec: ModelSpec
) -> EncoderPlan:
    """Resolve the stages of a method that lie inside an encoder, with their numbers.

    Raises:
        ConfigError: a layer that does not exist, or a signal that is not there yet.
    """
    plan = EncoderPlan()
    for number, stage in numbered:
        layer = stage.site.resolve(spec.encoder_layers)
        _check(method, stage)
        by_layer = plan.inside if stage.site.after_attention else plan.entry
        by_layer.setdefault(layer, []).append((number, stage))
    return plan


def _check(method: PruningMethod, stage: Stage) -> None:
    for signal in stage.signals:
        if isinstance(signal, DecoderSignal):
            raise ConfigError(
                f"{method.name}: {signal} is not there inside an encoder: no decoder has run."
            )
        if isinstance(signal, TokenSignal):
            raise ConfigError(
                f"{method.name}: {signal} is not there inside an encoder. Act at the projector."
            )
        if isinstance(signal, EncoderSignal):
            if signal.layer != "own" or signal.uses != "attention":
                raise ConfigError(
                    f"{method.name} asks at {stage.site} for {signal}: inside an encoder a stage "
                    f"is shown attention of the layer that it acts in. Use layer='own'."
                )
            if not stage.site.after_attention:
                raise ConfigError(
                    f"{method.name} reads attention of the layer that it acts in, at {stage.site}: "
                    f"on entering a layer its attention has not run. Use after_attention=True."
                )
