# SPDX-License-Identifier: Apache-2.0
"""What of a chain of methods does not compose, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from visprune.core.budget import Budget
from visprune.core.chain import Act, Chain
from visprune.core.method import PruningMethod
from visprune.core.signals.base import EncoderSignal
from visprune.errors import ConfigError


def composed(method: PruningMethod, acts: Sequence[Act]) -> list[Act]:
    """The acts of a run as they compose; a method alone is returned as it is.

    Raises:
        ConfigError: two members act inside the encoder; a member reads patches of an encoder that
            another one reduces; or a member would keep at least what is left to it.
    """
    if not isinstance(method, Chain):
        return list(acts)
    inside = _inside(method, acts)
    _check_budgets(method, acts)
    _check_weights(method, acts)
    if inside is None:
        return list(acts)
    return [_without_encoder(method, act, inside) for act in acts]


def _inside(chain: Chain, acts: Sequence[Act]) -> int | None:
    """The member that acts inside the encoder, if any."""
    found = list(dict.fromkeys(a.member for a in acts if a.stage.site.kind == "encoder"))
    if len(found) > 1:
        names = " and ".join(chain.members[n].name for n in found if n is not None)
        raise ConfigError(
            f"{chain.name}: {names} both act inside the image encoder, where the sizes and the "
            f"origin of its tokens are one method's. Leave one of them out."
        )
    return found[0] if found else None


def _without_encoder(chain: Chain, act: Act, inside: int) -> Act:
    """An act whose wants of the encoder are given up; refused where it needs them."""
    if act.member == inside:
        return act
    for signal in act.stage.needs:
        if isinstance(signal, EncoderSignal):
            raise ConfigError(
                f"{chain.name}: {act.method.name} is shown {signal}, one entry a patch, and "
                f"{chain.members[inside].name} leaves fewer patches in the encoder. Chain it with "
                f"a method that acts behind the encoder."
            )
    wants = tuple(signal for signal in act.stage.wants if not isinstance(signal, EncoderSignal))
    return replace(act, stage=replace(act.stage, wants=wants))


def _check_weights(chain: Chain, acts: Sequence[Act]) -> None:
    """Refuse an eviction behind a method whose merged tokens weigh more: heads keep other slots."""
    heavy = next((act.method.name for act in acts if act.weighs), None)
    cache = next((act.method.name for act in acts if act.stage.site.kind == "cache"), None)
    if heavy is not None and cache is not None:
        raise ConfigError(
            f"{chain.name}: {heavy} weighs merged tokens by their size in attention, and {cache} "
            f"leaves slots in the cache whose sizes are not followed. Give {heavy} prop_attn=False."
        )


def _check_budgets(chain: Chain, acts: Sequence[Act]) -> None:
    """Refuse a member that never drops a token: a number that is no less than what is left."""
    left: tuple[int, Act] | None = None
    idle: dict[int | None, tuple[int, int, str]] = {}
    busy: set[int | None] = set()
    for act in acts:
        budget = act.stage.budget
        if not isinstance(budget, Budget) or budget.num_keep is None:
            busy.add(act.member)
            continue
        if left is None or budget.num_keep < left[0]:
            busy.add(act.member)
            left = budget.num_keep, act
        elif act.member != left[1].member:
            idle[act.member] = budget.num_keep, left[0], left[1].method.name
    for member, (wanted, there, name) in idle.items():
        if member not in busy and member is not None:
            raise ConfigError(
                f"{chain.name}: {chain.members[member].name} keeps {wanted} of the {there} tokens "
                f"that {name} leaves, so it would never drop any. Stages run in order of depth; "
                f"give it fewer than {there}."
            )
