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
_FIRST = "That is the first: no layer is left to save."


@dataclass
class EncoderPlan:
    """The stages inside an encoder, by 0-based layer; each with its number in the schedule.

    Attributes:
        entry: run on entering a layer.
        inside: run between a layer's attention and its MLP.
        compared: layers whose stage is shown what enters them and the layer before.
        back: the layer behind which all patches are there again; ``None``: what leaves is gone.
        steady: layers whose attention sees all patches, though some have left.
    """

    entry: dict[int, list[Numbered]] = field(default_factory=dict)
    inside: dict[int, list[Numbered]] = field(default_factory=dict)
    compared: set[int] = field(default_factory=set)
    back: int | None = None
    steady: range = range(0)

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
            before = total if layer in self.steady else left
            for _, stage in self.inside.get(layer, ()):
                left = length_after(stage, left, total)
            found.append((before, left))
            if layer == self.back:
                left = total
        return found

    def leaving(self, total: int, layer: int) -> int:
        """Patches that leave a layer, of ``total``."""
        back = self.back is not None and layer >= self.back
        return total if back else self.counts(total, layer + 1)[-1][1]


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
        ConfigError: a layer that does not exist, a signal that is not there yet, or patches that
            would come back where others are gone, or behind the layer that the model reads.
    """
    plan, stages = EncoderPlan(), list(numbered)
    for number, stage in stages:
        layer = stage.site.resolve(spec.encoder_layers)
        _check(method, stage)
        by_layer = plan.inside if stage.site.after_attention else plan.entry
        by_layer.setdefault(layer, []).append((number, stage))
        if any(_compares(signal) for signal in stage.signals):
            plan.compared.add(layer)
        if stage.restores is not None:
            _bring_back(plan, method, stage, layer, spec)
    if plan.back is not None and len(stages) > 1:
        raise ConfigError(
            f"{method.name} brings back what leaves at one stage, and has {len(stages)} inside the "
            f"encoder: what others drop or merge would have no place. Give it one stage there."
        )
    for layer in plan.compared:
        if layer == 0 or plan.inside.get(layer - 1):
            raise ConfigError(
                f"{method.name} looks at encoder layer {layer} for what the layer before has "
                f"changed, and "
                + ("there is none before it." if layer == 0 else "patches leave inside that one.")
                + f" Let it act at another layer, 1 to {spec.encoder_layers - 1}."
            )
    return plan


def _bring_back(
    plan: EncoderPlan, method: PruningMethod, stage: Stage, layer: int, spec: ModelSpec
) -> None:
    """Note where the patches of a stage come back."""
    last = spec.encoder_layers - 1
    end = last if spec.encoder_end is None else min(spec.encoder_end, last)
    if stage.site.after_attention or layer > end:
        raise ConfigError(
            f"{method.name} brings its patches back behind encoder layer {end}, whose output is "
            f"read, and lets them leave at {stage.site}. "
            + (f"Let them leave on entering a layer, 1 to {end}." if end else _FIRST)
        )
    plan.back = end
    plan.steady = range(layer, min(layer + (stage.restores or 0), end + 1))


def _compares(signal: object) -> bool:
    """Whether a signal is of what enters a layer and the one before."""
    return isinstance(signal, EncoderSignal) and signal.uses == "entry"


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
            if signal.layer != "own" or signal.uses == "output":
                raise ConfigError(
                    f"{method.name} asks at {stage.site} for {signal}: inside an encoder a stage "
                    f"is shown attention of the layer that it acts in, or what enters it. Use "
                    f"layer='own'."
                )
            if signal.uses == "entry" and stage.site.after_attention:
                raise ConfigError(
                    f"{method.name} looks at what enters the layer, at {stage.site}: between its "
                    f"attention and its MLP that is gone. Use after_attention=False."
                )
            if signal.uses == "attention" and not stage.site.after_attention:
                raise ConfigError(
                    f"{method.name} reads attention of the layer that it acts in, at {stage.site}: "
                    f"on entering a layer its attention has not run. Use after_attention=True."
                )
