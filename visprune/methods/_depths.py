# SPDX-License-Identifier: Apache-2.0
"""Schedules that thin an encoder's tokens out at a few depths, by the same factor at each."""

from __future__ import annotations

from collections.abc import Iterable

from visprune.core import Budget, ModelSpec, Schedule, Signal, Site, Stage, StepBudget
from visprune.errors import BudgetError, ConfigError

# Layers 3, 6 and 9 of 12: DynamicViT, EViT and "Which Tokens to Use?" (arXiv:2308.04657) alike.
DEPTHS = (0.25, 0.5, 0.75)


def checked_depths(layers: Iterable[int | float]) -> tuple[int | float, ...]:
    """Return ``layers`` as a tuple.

    Raises:
        ConfigError: there is none.
    """
    depths = tuple(layers)
    if not depths:
        raise ConfigError(f"layers names at least one layer or fraction of the depth, as {DEPTHS}.")
    return depths


def resolved(layers: Iterable[int | float], spec: ModelSpec) -> list[int]:
    """The layers of an encoder; on a shallow one, two fractions may fall on one."""
    return sorted({Site.encoder(layer).resolve(spec.encoder_layers) for layer in layers})


def geometric(
    budget: Budget,
    layers: Iterable[int | float],
    spec: ModelSpec,
    needs: tuple[Signal, ...] = (),
    *,
    after_attention: bool = True,
) -> Schedule:
    """One stage per layer.

    Args:
        budget: ``keep_ratio``: the fraction kept at each stage, so that ``int(keep_ratio ** s n)``
            of a picture's n patches are left after the s-th; ``num_keep``: the patches left after
            the last, thinned out by the same factor at each.
        layers: 0-based, or fractions of the depth.
        spec: the model.
        needs: what the method is shown.
        after_attention: between attention and MLP, or on entering the layer.

    Raises:
        BudgetError: the budget counts frames, which an encoder sees one by one.
    """
    if budget.num_keep_per_frame is not None:
        raise BudgetError(
            f"num_keep_per_frame={budget.num_keep_per_frame} counts the frames of a clip, and "
            f"inside an encoder every picture is by itself. Use num_keep or keep_ratio."
        )
    numbers, stages = resolved(layers, spec), []
    for done, layer in enumerate(numbers, start=1):
        if budget.num_keep is not None:
            step = StepBudget(num_keep=budget.num_keep, share=done / len(numbers))
        else:
            ratio = (budget.keep_ratio or 0.0) ** done
            step = StepBudget(keep_ratio=ratio, of="original", rounding="floor")
        site = Site.encoder(layer, after_attention=after_attention)
        stages.append(Stage(site, step, needs))
    return tuple(stages)


def increasing(name: str, layers: Iterable[int | float]) -> tuple[int | float, ...]:
    """Return a method's decoder ``layers`` as a tuple.

    Raises:
        ConfigError: there is none, or they are not all of one kind and in rising order.
    """
    found = tuple(layers)
    alike = len({isinstance(layer, float) for layer in found}) == 1
    if not alike or list(found) != sorted(set(found)):
        raise ConfigError(
            f"{name} takes layers in rising order, all 0-based numbers or all fractions of the "
            f"depth, at least one; got {found}."
        )
    return found
