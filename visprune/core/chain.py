# SPDX-License-Identifier: Apache-2.0
"""Several methods on one model: their stages, in order of depth.

The rule. The stages of all members run in order of depth: inside the encoder, at the projector, on
entering each decoder layer, in the cache; at one place in the order of the members. What one
leaves, the next sees: a member's ``keep_ratio`` is a fraction of the tokens that are there when its
first stage begins, its signals are those of the tokens that are left (a merged token has those of
the token that it stands for), and costs add up. What cannot be so composed is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from visprune.core.budget import WORDS, Schedule, Stage
from visprune.core.method import Context, ModelSpec, PositionRule, PruningMethod
from visprune.core.selection import Selection
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError


@dataclass(frozen=True)
class Act:
    """One stage of a run, and whose it is.

    Attributes:
        method: the method, or the member of a chain.
        number: the stage's number in that method's own schedule.
        stage: the stage.
        member: the member's number in the chain; ``None``: there is no chain.
    """

    method: PruningMethod
    number: int
    stage: Stage
    member: int | None = None

    @property
    def weighs(self) -> bool:
        """Whether decoder layers, from the stage on, add the logarithm of sizes to their scores."""
        return self.method.size_bias and self.stage.site.kind == "decoder"

    def of_clip(self, frames: Sequence[int], spec: ModelSpec) -> Act:
        """The act on one picture or clip: itself, unless its budget counts frames.

        Args:
            frames: tokens that each frame of the clip has; none of a picture.
            spec: the model.

        Raises:
            BudgetError: it counts frames, and there are none, or none that are alike.
        """
        method = self.method.of_clip(frames)
        if method is self.method:
            return self
        budget = method.schedule(spec)[self.number].budget
        return replace(self, method=method, stage=replace(self.stage, budget=budget))


@dataclass(frozen=True, kw_only=True)
class Chain(PruningMethod):
    """Methods that act one after another on one model; see the module for the rule.

    Args:
        members: at least two methods, none of them a chain.
        positions: for all of them; ``None``: what members were given, which must agree; else their
            own default, and ``"original"`` where those differ.
        strict: for all of them.
    """

    members: tuple[PruningMethod, ...]

    def __post_init__(self) -> None:
        """Check the members."""
        super().__post_init__()
        members = tuple(self.members)
        for member in members:
            if not isinstance(member, PruningMethod) or isinstance(member, Chain):
                raise ConfigError(f"A chain takes built methods, none of them a chain; {member!r}.")
        if len(members) < 2:
            raise ConfigError(f"A chain has at least two methods, got {len(members)}.")
        if self.strict:
            members = tuple(replace(member, strict=True) for member in members)
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "name", "+".join(member.name for member in members))
        self._check_positions()

    def _check_positions(self) -> None:
        given = {m.positions: m.name for m in self.members if m.positions is not None}
        if self.positions is None and len(given) > 1:
            raise ConfigError(
                f"{self.name}: {given['original']} has positions='original', {given['compact']} "
                f"'compact'; a token has one position. Give positions= for all of them."
            )

    @property
    def rule(self) -> PositionRule:
        """The position rule of all."""
        given = [m.positions for m in self.members if m.positions is not None]
        own = {m.default_positions for m in self.members}
        return self.positions or (given[0] if given else own.pop() if len(own) == 1 else "original")

    @property
    def asks_the_last_token(self) -> bool:
        """Whether any of them does."""
        return any(member.asks_the_last_token for member in self.members)

    @property
    def num_keep(self) -> int | None:
        """Of the last member that has a number to keep."""
        found = [getattr(m, "num_keep", None) for m in self.members]
        return next((number for number in reversed(found) if number is not None), None)

    def schedule(self, spec: ModelSpec) -> Schedule:
        """The stages of all, in order of depth."""
        return tuple(act.stage for act in acts(self, spec))

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Refused: each stage belongs to a member, which chooses."""
        raise ConfigError(f"{self.name} is a chain; its members choose: see chain.acts.")

    def to_dict(self) -> dict[str, Any]:
        """Name, members, and what holds for all."""
        return {
            "method": self.name,
            "members": [member.to_dict() for member in self.members],
            "positions": self.positions,
            "strict": self.strict,
        }


def acts(method: PruningMethod, spec: ModelSpec) -> list[Act]:
    """The stages of a method or a chain on a model, in order of depth."""
    if not isinstance(method, Chain):
        return [Act(method, n, stage) for n, stage in enumerate(method.schedule(spec))]
    found = [
        Act(member, n, stage, order)
        for order, member in enumerate(method.members)
        for n, stage in enumerate(member.schedule(spec))
    ]
    return sorted(found, key=lambda act: act.stage.site.depth(spec.num_layers))


def split_options(
    kinds: Sequence[type[PruningMethod]], options: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Share the options of ``"a+b"`` out among its members.

    ``"a.option"`` is for ``a``; ``positions`` and ``strict`` are for the chain; any other belongs
    to the one member that has it. A budget without a name is what is left in the end: of
    ``num_keep`` (or ``num_keep_per_frame``) each member with a budget keeps twice as many as the
    next one, of ``keep_ratio`` each keeps the same part of what it is given.

    Args:
        kinds: the members' classes.
        options: by name.

    Returns:
        The options of each member, and those of the chain.

    Raises:
        ConfigError: an option that is no member's, or several members'.
    """
    names = [kind.name for kind in kinds]
    known = [{f.name for f in fields(kind)} for kind in kinds]
    own: list[dict[str, Any]] = [{} for _ in kinds]
    whole: dict[str, Any] = {}
    for key, value in options.items():
        name, dot, option = key.partition(".")
        if dot:
            at = [n for n, other in enumerate(names) if other == name]
            if len(at) != 1:
                raise ConfigError(
                    f"{key}: {'+'.join(names)} has {len(at)} members called {name!r}. Give a list "
                    f"of built methods where a name stands twice."
                )
            own[at[0]][option] = value
        elif key in ("positions", "strict"):
            whole[key] = value
        elif key not in WORDS:
            at = [n for n, each in enumerate(known) if key in each]
            if len(at) != 1:
                which = " and ".join(names[n] for n in at) or "no member"
                raise ConfigError(
                    f"{'+'.join(names)}: {key!r} is an option of {which}; say whose it is: "
                    f"{names[at[0] if at else 0]}.{key}=..."
                )
            own[at[0]][key] = value
    _share_budget(own, known, {k: v for k, v in options.items() if k in WORDS})
    return own, whole


def _share_budget(own: list[dict[str, Any]], known: list[set[str]], budget: dict[str, Any]) -> None:
    """Give a budget of the whole to the members that take one and have none."""
    takes = [
        n
        for n, each in enumerate(known)
        if {"num_keep", "keep_ratio", *budget} <= each and not {*own[n]} & {*WORDS}
    ]
    if not budget:
        return
    if not takes:
        raise ConfigError(f"No member takes a budget that is left open; got {budget}.")
    for rank, n in enumerate(reversed(takes)):
        for key, value in budget.items():
            if key != "keep_ratio" and isinstance(value, int) and not isinstance(value, bool):
                value = value * 2**rank
            elif isinstance(value, float) and value > 0:
                value = value ** (1 / len(takes))
            own[n][key] = value
