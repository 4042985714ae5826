# SPDX-License-Identifier: Apache-2.0
"""Where a method acts on one model: its schedule, resolved and checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from visprune.core.budget import Budget, Stage, StepBudget
from visprune.core.method import ModelSpec, PositionRule, PruningMethod
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.encoder.plan import TowerPlan, check_encoder, make_tower_plan


@dataclass
class Plan:
    """A resolved schedule.

    Attributes:
        positions: the rule in force.
        projector_stages: (number, stage) pairs before the first layer.
        decoder_stages: the same by 0-based layer, run on entering it.
        previous_attention: the stage that each layer's attention is read for as it runs.
        cls_layers: encoder layers whose class-token attention is read.
        vision_keys: whether the feature layer's keys are read.
        fingerprint: whether pictures are fingerprinted.
        vision: the stages inside the encoder.
    """

    positions: PositionRule = "original"
    projector_stages: list[tuple[int, Stage]] = field(default_factory=list)
    decoder_stages: dict[int, list[tuple[int, Stage]]] = field(default_factory=dict)
    previous_attention: dict[int, Stage] = field(default_factory=dict)
    cls_layers: list[Literal["last", "feature"]] = field(default_factory=list)
    vision_keys: bool = False
    fingerprint: bool = False
    vision: TowerPlan = field(default_factory=TowerPlan)

    @property
    def budgets(self) -> list[Budget]:
        """The budgets of all stages that have one."""
        staged = [*self.projector_stages, *(s for x in self.decoder_stages.values() for s in x)]
        return [stage.budget for _, stage in staged if isinstance(stage.budget, Budget)]


def make_plan(method: PruningMethod, spec: ModelSpec) -> Plan:
    """Resolve and check a method's schedule.

    Raises:
        ConfigError: a layer that does not exist, or positions that the model cannot have.
        UnsupportedModel: a site or a signal that the model does not offer.
    """
    plan = Plan(positions=_positions(method, spec))
    if method.only_in_towers:
        check_encoder(method, spec)
    schedule = method.schedule(spec)
    for number, stage in enumerate(schedule):
        if stage.site.kind == "vision":
            continue
        _place(plan, method, spec, number, stage)
        _signals(plan, method, spec, stage)
    if any(stage.site.kind == "vision" for stage in schedule):
        no_rows = None if spec.has_cls else f"the encoder of {spec.family} has none"
        plan.vision = make_tower_plan(method, schedule, spec, no_cls_rows=no_rows)
    return plan


def _positions(method: PruningMethod, spec: ModelSpec) -> PositionRule:
    if not spec.multi_axis_rope:
        return method.positions or method.default_positions
    if method.positions == "compact":
        raise ConfigError(
            f"positions='compact' closes up a line of ids; {spec.family} gives tokens (t, h, w) "
            f"places that survivors keep. Use positions='original'."
        )
    return "original"


def _place(plan: Plan, method: PruningMethod, spec: ModelSpec, number: int, stage: Stage) -> None:
    kind = stage.site.kind
    if kind == "projector":
        if stage.needs.attention is not None:
            raise ConfigError(
                f"{method.name}: decoder attention is not there yet at the projector."
            )
        plan.projector_stages.append((number, stage))
        return
    if kind != "decoder":
        raise UnsupportedModel(
            f"{method.name} acts at {stage.site}, which no adapter of {spec.family} offers yet. "
            f"Sites: projector, decoder(layer), vision(layer) inside some encoders."
        )
    layer = stage.site.resolve(spec.num_layers)
    if stage.needs.attention is not None and stage.needs.attention_layer == "previous":
        if layer == 0:
            raise ConfigError(
                f"{method.name} reads the attention of the layer before the one it acts at; "
                f"decoder layer 0 has none before it. Use layer 1 to {spec.num_layers - 1}."
            )
        if layer - 1 in plan.previous_attention:
            raise ConfigError(f"{method.name}: two stages read the attention of layer {layer - 1}.")
        plan.previous_attention[layer - 1] = stage
    plan.decoder_stages.setdefault(layer, []).append((number, stage))


def _signals(plan: Plan, method: PruningMethod, spec: ModelSpec, stage: Stage) -> None:
    needs = stage.needs
    plan.fingerprint = plan.fingerprint or needs.fingerprint
    if (needs.cls_required or needs.vision_keys) and not spec.has_cls:
        raise UnsupportedModel(
            f"{method.name} ranks patches by the attention of the vision encoder's class token, "
            f"and the encoder of {spec.family} has none. Methods that need none: todre, divprune, "
            f"fastv, pyramiddrop, pool, random, uniform."
        )
    if needs.cls_attention == "own" or isinstance(stage.budget, StepBudget):
        raise ConfigError(
            f"{method.name} asks at {stage.site} for what only a site inside an encoder has: "
            f"attention of its own layer, or a StepBudget."
        )
    if not spec.has_cls:
        return
    if needs.cls_attention is not None and needs.cls_attention not in plan.cls_layers:
        plan.cls_layers.append(needs.cls_attention)
    plan.vision_keys = plan.vision_keys or needs.vision_keys
