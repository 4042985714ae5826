# SPDX-License-Identifier: Apache-2.0
"""The rows of a study's tables: methods at budgets, and the controls that every table carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visprune.catalog import get_method, parameters
from visprune.core.method import PruningMethod
from visprune.core.numeric import plain
from visprune.errors import BudgetError, ConfigError, did_you_mean
from visprune.eval.models.base import NO_IMAGE, NONE, Choice
from visprune.eval.records.record import canonical

__all__ = ["CONTROLS", "Variant", "expand", "listed"]

CONTROLS = (NONE, "keep_all", "random", "uniform", "pool", NO_IMAGE)
_BASELINES = (NONE, NO_IMAGE)
_NEED_BUDGET = ("random", "uniform", "pool")
_BUDGETS = ("num_keep", "keep_ratio", "r", "num_keep_per_frame")


@dataclass(frozen=True)
class Variant:
    """A row of the tables: a method at a budget.

    Attributes:
        label: what tables call it.
        choice: the method, ``"none"`` or ``"no_image"``.
        num_keep: its budget, where that is a number of tokens.
        control: it is a control.
        seeded: random draws follow the study's seed.
    """

    label: str
    choice: Choice
    num_keep: int | None = None
    control: bool = False
    seeded: bool = False

    def at(self, seed: int) -> Choice:
        """The method with the study's seed, if it draws."""
        if self.seeded and isinstance(self.choice, PruningMethod):
            return dataclasses.replace(self.choice, seed=seed)  # type: ignore[call-arg]
        return self.choice

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, method and parameters among them."""
        head = {"label": self.label, "num_keep": self.num_keep, "control": self.control}
        return {**head, **method_dict(self.choice)}


def method_dict(choice: Choice) -> dict[str, Any]:
    """What a cell holds of a method."""
    return {"method": choice} if isinstance(choice, str) else choice.to_dict()


def listed(what: str, value: Any) -> list[Any]:
    """One value or several, as a list.

    Raises:
        ConfigError: a seed that is no whole number from 0.
    """
    if value is None:
        return []
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if several else [value]
    if what == "seeds" and any(type(seed) is not int or seed < 0 for seed in values):
        raise ConfigError(f"seeds are whole numbers from 0, got {values}.")
    return values


def expand(methods: Any, budgets: Any, controls: Any = True) -> tuple[list[Variant], list[str]]:
    """Set every method and control at every budget that it takes.

    Args:
        methods: names, mappings with ``method`` and parameters (``label`` and ``budgets`` among
            them), or built methods.
        budgets: numbers of tokens, fractions that stay, or mappings such as ``{"r": 13}``.
        controls: ``True`` for all of :data:`CONTROLS`, but for those that take no budget of the
            study; or a list of them. The untouched model comes first, the blind one last.

    Returns:
        The rows, and a sentence on controls that were left out, if any were.

    Raises:
        ConfigError: an unknown name or parameter, a budget out of range or of another kind than a
            control that was named takes, or one method at one budget under two labels.
    """
    wanted = _wanted(controls)
    shared = [_budget(budget) for budget in listed("budgets", budgets)]
    asked: list[Variant] = []
    for entry in listed("methods", methods):
        asked += _expand(entry, shared, control=False)
    _check_asked(asked, shared, wanted)
    # Controls stand at the study's budgets; without any, where the methods' own are.
    stands = shared or [budget for budget in map(_own_budget, asked) if budget]
    bracket = {canonical(budget): budget for budget in stands if budget}
    left, why = _misfits(wanted, bracket.values())
    if left and controls is not None and controls is not True:
        raise BudgetError(f"controls: {why}")
    found: list[Variant] = []
    for name in wanted:
        if name not in left and (name not in _NEED_BUDGET or bracket):
            found += _expand(name, bracket.values(), control=True)
    blind = [variant for variant in found if variant.choice == NO_IMAGE]
    found = [variant for variant in found if variant.choice != NO_IMAGE] + asked + blind
    # A control that is also listed as a method is one row.
    unique: dict[tuple[str, bytes], Variant] = {}
    for variant in found:
        unique.setdefault((variant.label, canonical(method_dict(variant.choice))), variant)
    return list(unique.values()), [f"left out: {why}"] if left else []


def _wanted(controls: Any) -> list[str]:
    """Names of controls."""
    if controls is None or isinstance(controls, bool):
        return list(CONTROLS) if controls is not False else []
    names = listed("controls", controls)
    for name in names:
        if name not in CONTROLS:
            hint = did_you_mean(str(name), CONTROLS)
            raise ConfigError(f"Unknown control {name!r}.{hint} Controls: {', '.join(CONTROLS)}.")
    return names


def _check_asked(
    asked: Sequence[Variant], shared: Iterable[dict[str, Any]], controls: Sequence[str]
) -> None:
    """Refuse a method under two labels, and budgets that speak of nothing."""
    labels: dict[tuple[bytes, bool], str] = {}
    known = {*_BUDGETS}.union(*(_fields(name) for name in controls if name in _NEED_BUDGET))
    for variant in asked:
        first = labels.setdefault(
            (canonical(method_dict(variant.choice)), variant.seeded), variant.label
        )
        if first != variant.label:
            raise ConfigError(
                f"The methods {first!r} and {variant.label!r} are the same at the same budget; "
                f"leave one of them out."
            )
        if isinstance(variant.choice, PruningMethod):
            known |= {f.name for f in dataclasses.fields(variant.choice)}
    for budget in shared:
        for key in budget:
            if key not in known:
                raise ConfigError(
                    f"budgets: no method of the study has a parameter {key!r}."
                    f"{did_you_mean(str(key), known)}"
                )


def _fields(name: str) -> set[str]:
    return parameters(name)


def _misfits(controls: Sequence[str], budgets: Collection[dict[str, Any]]) -> tuple[list[str], str]:
    """Controls that can stand at none of the budgets, such as ``{"r": 13}``, and why."""
    left = [
        name
        for name in controls
        if name in _NEED_BUDGET and budgets and not any({*b} <= _fields(name) for b in budgets)
    ]
    given = ", ".join(f"{key}={value}" for budget in budgets for key, value in budget.items())
    return left, (
        f"{', '.join(left)}: such a control takes num_keep or keep_ratio and nothing else, and the "
        f"study stands at {given}; to have it, give the study such a budget too (budgets: [64], "
        f"--num-keep 64)."
    )


def _expand(entry: Any, budgets: Iterable[dict[str, Any]], control: bool) -> list[Variant]:
    """One entry at each budget that it takes."""
    if isinstance(entry, PruningMethod):
        return [_variant(entry, _budget_text(entry), None, control, seeded=False)]
    options = dict(entry) if isinstance(entry, Mapping) else {"method": entry}
    name, label = options.pop("method", None), options.pop("label", None)
    own = options.pop("budgets", None)
    if not isinstance(name, str):
        raise ConfigError(f"A method is a name, or a mapping with 'method': {entry!r}.")
    if name in _BASELINES:
        return [Variant(str(label or name), name, control=name != NONE)]
    fields = _fields(name)
    seeded = "seed" in fields and "seed" not in options and "+" not in name
    control = control or name in CONTROLS
    taken = [*budgets] if own is None else [_budget(budget) for budget in listed("budgets", own)]
    fitting = [budget for budget in taken if set(budget) <= fields and not set(budget) & {*options}]
    if any(key in options for key in _BUDGETS) or not fitting:
        fitting = [{}]
    methods: dict[bytes, PruningMethod] = {}
    for budget in fitting:
        method = _build(name, options, budget)
        methods.setdefault(canonical(method.to_dict()), method)
    return [
        _variant(method, _budget_text(method), label, control, seeded=seeded)
        for method in methods.values()
    ]


def _build(name: str, options: dict[str, Any], budget: dict[str, Any]) -> PruningMethod:
    """The method at a budget; without one where its options leave no place for it."""
    try:
        return get_method(name, **options, **budget)
    except BudgetError:
        if not budget:
            raise
        try:
            return get_method(name, **options)
        except BudgetError:
            pass
        raise


def _budget(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"A budget is a number of tokens (64), a fraction that stays (0.25), or a mapping such "
            f"as {{r: 13}}; got {value!r}."
        )
    return {"num_keep": value} if isinstance(value, int) else {"keep_ratio": value}


def _own_budget(variant: Variant) -> dict[str, Any]:
    """The budget that a variant stands at."""
    values = {name: getattr(variant.choice, name, None) for name in _BUDGETS}
    return {name: value for name, value in values.items() if value is not None}


def _budget_text(method: PruningMethod) -> str:
    """``"64"``, ``"25 %"``, ``"r=13"``, ``"8 a frame"``, or nothing."""
    values = [getattr(method, name, None) for name in _BUDGETS]
    if values[0] is not None:
        return str(values[0])
    if values[1] is not None:
        return f"{100 * float(values[1]):g} %"
    if values[3] is not None:
        return f"{values[3]} a frame"
    return "" if values[2] is None else f"r={values[2]}"


def _variant(
    method: PruningMethod, budget: str, label: str | None, control: bool, *, seeded: bool
) -> Variant:
    name = f"{label or method.name} {budget}".strip()
    num_keep = getattr(method, "num_keep", None)
    return Variant(name, method, num_keep, control or method.name in CONTROLS, seeded)
