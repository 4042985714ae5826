# SPDX-License-Identifier: Apache-2.0
"""Where a method acts on one model: its schedule, resolved and checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from visprune.catalog import methods
from visprune.core.budget import Budget, Stage, StepBudget
from visprune.core.cache import CacheStage
from visprune.core.chain import Act, Chain, acts
from visprune.core.method import ModelSpec, PositionRule, PruningMethod
from visprune.core.signals.ahead import AheadSignal
from visprune.core.signals.base import DecoderSignal, EncoderSignal, PictureSignal, Signal
from visprune.core.site import Site
from visprune.errors import ConfigError, UnsupportedModel, VispruneError
from visprune.machine.compose import composed
from visprune.machine.encoder.plan import EncoderPlan, make_encoder_plan

Numbered = tuple[int, Stage]


@dataclass
class Plan:
    """A resolved schedule; stages stand with their number in it.

    Attributes:
        positions: the rule in force.
        acts: all stages by number, each with its method (of a chain, the member).
        inside: the method that acts inside the image encoder: the method itself, or that member.
        pixels: the stage before the image encoder, with its number, and whose it is.
        encoder: the stages inside the image encoder.
        projector_stages: those before the first decoder layer.
        decoder_stages: those of the decoder by 0-based layer, run on entering it.
        previous: stages that are shown attention of a layer as it ran, by that layer.
        own: layers whose stage is shown queries and keys of the layer itself, ahead of its run.
        states: stages that are shown what entered a layer, by that layer.
        inputs: stages that are shown what enters the first.
        ahead: the layer that a first pass goes to, by the number of the stage that asks for it.
        cache: the stage at the cache, with its number.
    """

    positions: PositionRule = "original"
    acts: list[Act] = field(default_factory=list)
    inside: PruningMethod | None = None
    pixels: tuple[Numbered, PruningMethod] | None = None
    encoder: EncoderPlan = field(default_factory=EncoderPlan)
    projector_stages: list[Numbered] = field(default_factory=list)
    decoder_stages: dict[int, list[Numbered]] = field(default_factory=dict)
    previous: dict[int, list[Stage]] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    states: dict[int, list[Stage]] = field(default_factory=dict)
    inputs: list[Stage] = field(default_factory=list)
    ahead: dict[int, int] = field(default_factory=dict)
    cache: tuple[int, CacheStage] | None = None

    @property
    def stages(self) -> list[Stage]:
        """All stages behind the encoder."""
        numbered = [*self.projector_stages, *(s for x in self.decoder_stages.values() for s in x)]
        return [stage for _, stage in numbered]

    def check_count(self, num_tokens: int, frames: Sequence[int], spec: ModelSpec) -> None:
        """Refuse a picture that a budget does not fit.

        Args:
            num_tokens: of the picture or clip.
            frames: tokens that each frame of a clip has; none of a picture.
            spec: the model.

        Raises:
            BudgetError: a strict method's budget exceeds ``num_tokens``, or it counts frames that
                there are not.
        """
        for act in self.acts:
            if act.stage.site.kind == "encoder":
                continue
            own = act.of_clip(frames, spec)
            if isinstance(own.stage.budget, Budget):
                own.stage.budget.resolve(num_tokens, strict=own.method.strict)

    @property
    def watched(self) -> list[int]:
        """Decoder layers whose attention is looked at."""
        return sorted({*self.previous, *self.own, *self.ahead.values()})

    @property
    def encoder_signals(self) -> list[EncoderSignal]:
        """What stages behind the encoder are shown of its layers."""
        return [s for s in _distinct(self.stages) if isinstance(s, EncoderSignal)]

    @property
    def picture_signals(self) -> list[PictureSignal]:
        """What they are shown of the pixels."""
        return [s for s in _distinct(self.stages) if isinstance(s, PictureSignal)]

    @property
    def required(self) -> list[Signal]:
        """What every picture must have been encoded with."""
        kinds = (EncoderSignal, PictureSignal)
        return [s for stage in self.stages for s in stage.needs if isinstance(s, kinds)]


def make_plan(method: PruningMethod, spec: ModelSpec) -> Plan:
    """Resolve and check a method's schedule.

    Raises:
        ConfigError: a layer that does not exist, or positions that the model cannot have.
        UnsupportedModel: a site or a signal that the model does not offer; names methods that need
            none.
    """
    try:
        return _plan(method, spec)
    except _Lacking as lacking:
        fits = ", ".join(fitting(spec)) or "none"
        raise UnsupportedModel(f"{lacking} Methods that fit it: {fits}.") from None


def fitting(spec: ModelSpec) -> list[str]:
    """Names of the methods that a model can be pruned by, in the registry's order."""
    return [name for name, kind in methods.items() if why_not(kind, spec) is None]


def why_not(method: type[PruningMethod], spec: ModelSpec) -> str | None:
    """Return why a model cannot be pruned by a method, whatever its budget; ``None``: it can."""
    try:
        _plan(method.example(), spec)
    except UnsupportedModel as error:
        return str(error)
    except VispruneError:  # of the example's own numbers
        return None
    return None


def inside_only(method: type[PruningMethod]) -> bool:
    """Whether a method acts inside an image encoder and nowhere else, also on a VLM."""
    return _sites(method) <= {"encoder"}


def acts_on_cache(method: type[PruningMethod]) -> bool:
    """Whether a method acts on the cache and nowhere else."""
    return _sites(method) == {"cache"}


def acts_before(method: type[PruningMethod]) -> bool:
    """Whether a method acts before the image encoder and nowhere else."""
    return _sites(method) == {"pixels"}


def _sites(method: type[PruningMethod]) -> set[str]:
    """Kinds of the sites at which a method acts on a model that has all of them."""
    spec = ModelSpec("", num_layers=32, has_cls=True, multi_axis_rope=False, encoder_layers=24)
    return {stage.site.kind for stage in method.example().schedule(spec)}


class _Lacking(UnsupportedModel):
    """A model lacks what a method needs; the message wants a list of methods that do not."""


def _plan(method: PruningMethod, spec: ModelSpec) -> Plan:
    for member in method.members if isinstance(method, Chain) else (method,):
        # A method of every layer of an encoder has none where there is no such layer.
        if not spec.encoder_layers and not member.schedule(spec):
            raise _Lacking(_no_encoder(member, spec))
        merging = spec.lacking.get("merging")
        if member.size_weighted and merging is not None:
            raise _Lacking(f"{member.name} merges tokens: {merging}.")
    plan = Plan(acts=composed(method, acts(method, spec)))
    for number, act in enumerate(plan.acts):
        _check(act.method, act.stage, spec)
        if act.stage.site.kind != "encoder":
            _place(plan, act.method, spec, number, _shown(act.stage, spec))
    plan.positions = _positions(method, spec)
    inside = [act for act in plan.acts if act.stage.site.kind == "encoder"]
    plan.inside = inside[0].method if inside else method
    plan.encoder = make_encoder_plan(plan.inside, [(a.number, a.stage) for a in inside], spec)
    return plan


def _check(method: PruningMethod, stage: Stage, spec: ModelSpec) -> None:
    """Refuse a site or a signal that a model does not offer."""
    if stage.site.kind == "encoder" and not spec.encoder_layers:
        raise _Lacking(_no_encoder(method, spec))
    if stage.site.kind == "encoder" and not method.gives_back and "dropping" in spec.lacking:
        raise _Lacking(
            f"{method.name} leaves patches without a value, and {spec.family} needs one for each: "
            f"{spec.lacking['dropping']}."
        )
    if stage.site.kind != "encoder" and stage.restores is not None:
        raise ConfigError(
            f"{method.name} brings tokens back that leave at {stage.site}; only a stage inside an "
            f"encoder can. Leave restores out."
        )
    if stage.site.kind != "encoder" and spec.is_vit:
        raise _Lacking(_wrong_site(method, stage, spec))
    if stage.site.kind == "pixels" and spec.patch_refusal:
        raise _Lacking(
            f"{method.name} leaves patches out before the image encoder, and {spec.family} cannot "
            f"do without them: {spec.patch_refusal}."
        )
    for signal in stage.needs:
        missing = signal.missing(spec)
        if missing is not None:
            raise _Lacking(f"{method.name} is shown {signal}, but {missing}.")


def _shown(stage: Stage, spec: ModelSpec) -> Stage:
    """The stage with those of its wants that the model has."""
    if isinstance(stage, CacheStage):
        return stage
    wants = tuple(signal for signal in stage.wants if signal.missing(spec) is None)
    return Stage(stage.site, stage.budget, stage.needs, wants)


def _no_encoder(method: PruningMethod, spec: ModelSpec) -> str:
    return (
        f"{method.name} acts inside the image encoder, and {spec.family} cannot be reduced there: "
        f"{spec.encoder_refusal}."
    )


def _wrong_site(method: PruningMethod, stage: Stage, spec: ModelSpec) -> str:
    where = {
        "pixels": "before a VLM's encoder",
        "decoder": "inside a language model's decoder",
        "cache": "in a language model's key-value cache",
    }.get(stage.site.kind, "behind a VLM's projector")
    return (
        f"{method.name} acts at {stage.site}, {where}; {spec.family} is a vision transformer alone "
        f"and has none."
    )


def _positions(method: PruningMethod, spec: ModelSpec) -> PositionRule:
    if not spec.multi_axis_rope:
        if isinstance(method, Chain):
            return method.rule
        return method.positions or method.default_positions
    members = method.members if isinstance(method, Chain) else ()
    if "compact" in (method.positions, *(member.positions for member in members)):
        raise ConfigError(
            f"positions='compact' closes up a line of ids; {spec.family} gives tokens (t, h, w) "
            f"places that survivors keep. Use positions='original'."
        )
    return "original"


def _place(plan: Plan, method: PruningMethod, spec: ModelSpec, number: int, stage: Stage) -> None:
    if isinstance(stage.budget, StepBudget) and stage.site.kind != "decoder":
        raise ConfigError(
            f"{method.name} has a StepBudget at {stage.site}; only a site inside an encoder or a "
            f"decoder has steps. Give a Budget."
        )
    for signal in stage.signals:
        if isinstance(signal, EncoderSignal) and (signal.layer == "own" or signal.uses == "entry"):
            raise ConfigError(
                f"{method.name} asks at {stage.site} for {signal}: a layer of its own is what only "
                f"a site inside an encoder has. Name a layer, 'last' or 'feature'."
            )
    decoder = [s for s in stage.signals if isinstance(s, DecoderSignal) and s.uses != "sequence"]
    if stage.site.kind == "pixels":
        _place_first(plan, method, number, stage)
        return
    ahead = [s for s in decoder if isinstance(s, AheadSignal)]
    if stage.site.kind == "projector":
        decoder = [s for s in decoder if s not in ahead]
        if decoder:
            raise ConfigError(
                f"{method.name}: {decoder[0]} is not there yet at the projector: no layer of the "
                f"decoder has run."
            )
        plan.projector_stages.append((number, stage))
        _look_ahead(plan, method, spec, number, ahead)
        return
    if ahead:
        raise ConfigError(
            f"{method.name} asks at {stage.site} for {ahead[0]}, for which a first pass is made "
            f"before the decoder runs. Let the stage stand at Site.projector()."
        )
    if isinstance(stage, CacheStage):
        if plan.cache is not None:
            raise ConfigError(
                f"{method.name} would evict from one cache twice. Chain one method that acts at "
                f"the cache with methods that act before it."
            )
        plan.cache = (number, stage)
        return
    if stage.site.kind != "decoder":
        raise UnsupportedModel(
            f"{method.name} acts at {stage.site}, which no adapter of {spec.family} offers yet. "
            f"Sites: pixels before some encoders, encoder(layer) inside some, projector, "
            f"decoder(layer), cache (with a CacheStage)."
        )
    layer = stage.site.resolve(spec.num_layers)
    if spec.deepest is not None and layer > spec.deepest:
        raise ConfigError(
            f"{method.name} acts at decoder layer {layer}. Later layers of {spec.family} attend to "
            f"keys of layer {spec.deepest}, which hold every token that was there: tokens can "
            f"leave at layers up to {spec.deepest}."
        )
    _watch(plan, method, spec, stage, layer, decoder)
    plan.decoder_stages.setdefault(layer, []).append((number, stage))


def _place_first(plan: Plan, method: PruningMethod, number: int, stage: Stage) -> None:
    """A stage before the encoder, which sees pixels and nothing else."""
    if stage.signals:
        raise ConfigError(
            f"{method.name}: {stage.signals[0]} is not there at {stage.site}: a stage before the "
            f"encoder is shown the pixels of each block of patches."
        )
    if plan.pixels is not None:
        raise ConfigError(
            f"{plan.pixels[1].name} and {method.name} both act before the image encoder. Leave one "
            f"of them out."
        )
    plan.pixels = (number, stage), method


def _look_ahead(
    plan: Plan, method: PruningMethod, spec: ModelSpec, number: int, signals: list[AheadSignal]
) -> None:
    """Note how far a first pass goes for a stage."""
    layers = {Site.decoder(signal.at).resolve(spec.num_layers) for signal in signals}
    if len(layers) > 1:
        raise ConfigError(
            f"{method.name} asks for layers {sorted(layers)} of a first pass, which ends at one."
        )
    for layer in layers:
        _check_attends(method, spec, signals[0], layer, own=True)
        plan.ahead[number] = layer


def _watch(
    plan: Plan,
    method: PruningMethod,
    spec: ModelSpec,
    stage: Stage,
    layer: int,
    signals: list[DecoderSignal],
) -> None:
    """Note which layers are looked at for a stage."""
    for signal in signals:
        if signal.uses == "input":
            plan.inputs.append(stage)
            continue
        own = signal.layer == "own"
        if signal.uses == "attention":
            _check_attends(method, spec, signal, layer, own=own)
        if own and signal.uses == "attention":
            plan.own.add(layer)
            continue
        if layer == 0:
            raise ConfigError(
                f"{method.name} is shown {signal} of the layer before the one it acts at; decoder "
                f"layer 0 has none before it. Use layer 1 to {spec.num_layers - 1}."
            )
        where = plan.previous if signal.uses == "attention" else plan.states
        staged = where.setdefault(layer - 1, [])
        if stage not in staged:
            staged.append(stage)


def _check_attends(
    method: PruningMethod, spec: ModelSpec, signal: DecoderSignal, layer: int, *, own: bool
) -> None:
    """Refuse to read attention of a layer that has none."""
    read = layer if own else layer - 1
    if read not in spec.recurrent:
        return
    attending = [n for n in range(spec.num_layers) if n not in spec.recurrent]
    places = [n if own else n + 1 for n in attending]
    fits = ", ".join(str(n) for n in places if n < spec.num_layers)
    raise ConfigError(
        f"{method.name} is shown {signal} of decoder layer {read}, which has no attention to "
        f"show: it carries a state, or looks at each token alone. Let it act at a layer "
        f"{'with' if own else 'behind one with'} attention: {fits}."
    )


def _distinct(stages: Iterable[Stage]) -> list[Signal]:
    """Signals of stages, each once."""
    return list(dict.fromkeys(signal for stage in stages for signal in stage.signals))
