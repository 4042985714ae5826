# SPDX-License-Identifier: Apache-2.0
"""Where a method acts inside one image encoder, resolved and checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from visprune.catalog import methods
from visprune.core.budget import Schedule, Stage, StepBudget
from visprune.core.method import ModelSpec, PruningMethod
from visprune.errors import ConfigError, UnsupportedModel

Numbered = tuple[int, Stage]


@dataclass
class TowerPlan:
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
    if isinstance(stage.budget, StepBudget):
        return stage.budget.resolve(entering, original)
    if stage.budget is None:
        raise ConfigError(f"A stage at {stage.site} needs a budget.")
    return min(stage.budget.resolve(original), entering)


def length_after(stage: Stage, entering: int, original: int) -> int:
    """Tokens of one picture after a stage, with those that it makes of the ones that leave."""
    if isinstance(stage.budget, StepBudget):
        return stage.budget.slots(entering, original)
    return step(stage, entering, original)


def make_tower_plan(
    method: PruningMethod,
    schedule: Schedule,
    spec: ModelSpec,
    *,
    no_cls_rows: str | None,
) -> TowerPlan:
    """Resolve the vision stages of a schedule.

    Args:
        method: whose schedule it is.
        schedule: its stages, on a model of ``spec``; those at other sites are left out.
        spec: the model.
        no_cls_rows: why the class token's attention cannot be read, or ``None``.

    Raises:
        ConfigError: a layer that does not exist, or a signal that is not there yet.
        UnsupportedModel: a signal that the encoder does not offer.
    """
    plan = TowerPlan()
    check_encoder(method, spec)
    for number, stage in enumerate(schedule):
        if stage.site.kind != "vision":
            continue
        layer = stage.site.resolve(spec.vision_layers)
        _check(method, stage, spec, no_cls_rows)
        by_layer = plan.inside if stage.site.after_attention else plan.entry
        by_layer.setdefault(layer, []).append((number, stage))
    return plan


def check_encoder(method: PruningMethod, spec: ModelSpec) -> None:
    """Refuse a model whose image encoder tokens cannot leave.

    Raises:
        UnsupportedModel: with the reason.
    """
    if spec.vision_layers:
        return
    raise UnsupportedModel(
        f"{method.name} acts inside the vision encoder, and {spec.family} cannot be reduced there: "
        f"{spec.vision_refusal}. Methods that act behind the encoder: "
        f"{_names(lambda m: not m.only_in_towers and (spec.has_cls or not _needs_cls(m)))}."
    )


def _needs_cls(method: type[PruningMethod]) -> bool:
    """Whether a method refuses models without a class token, as its class says."""
    return bool(getattr(method, "needs_cls", False))


def _names(fits: Callable[[type[PruningMethod]], bool]) -> str:
    """Names of the methods that ``fits`` is true of, in the registry's order."""
    return ", ".join(name for name in methods if fits(methods.get(name)))


def _check(method: PruningMethod, stage: Stage, spec: ModelSpec, no_cls_rows: str | None) -> None:
    needs = stage.needs
    if needs.attention is not None:
        raise ConfigError(f"{method.name}: there is no decoder attention inside an encoder.")
    signals = needs.cls_attention is not None or needs.vision_keys
    if signals and not stage.site.after_attention:
        raise ConfigError(
            f"{method.name} reads attention of the layer that it acts in, at {stage.site}: on "
            f"entering a layer its attention has not run. Use after_attention=True."
        )
    if needs.cls_attention is not None and needs.cls_required and no_cls_rows is not None:
        raise UnsupportedModel(
            f"{method.name} ranks patches by the attention of the class token, but {no_cls_rows}. "
            f"Methods that need no class token: "
            f"{_names(lambda m: (m.in_towers or not spec.is_vit) and not _needs_cls(m))}."
        )
