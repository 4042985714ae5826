# SPDX-License-Identifier: Apache-2.0
"""Input checks and the choice of a backend, shared by the operators of ``visprune.ops``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from visprune.errors import ConfigError, UnsupportedKernel, did_you_mean

BACKENDS = ("auto", "triton", "torch")


def choose(name: str, backend: str, device: torch.device, why_not: Callable[[], list[str]]) -> str:
    """Turn ``backend`` into ``"torch"`` or ``"triton"``; refuse a forced impossible one."""
    one_of(f"{name}: backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    reasons = why_not()
    if backend == "triton" and reasons:
        raise UnsupportedKernel(
            f"{name}: backend='triton' cannot run here: {'; '.join(reasons)}. "
            "Use backend='auto' or 'torch'."
        )
    return "torch" if reasons else "triton"


def one_of(what: str, got: str, allowed: tuple[str, ...]) -> None:
    """Refuse a name that is not allowed, with the nearest one."""
    if got not in allowed:
        hint = did_you_mean(str(got), allowed)
        raise ConfigError(f"{what} must be one of {', '.join(allowed)}; got {got!r}.{hint}")


def floating(name: str, **tensors: Tensor) -> None:
    """Refuse integer tensors, and tensors on several devices."""
    first = next(iter(tensors))
    for key, t in tensors.items():
        if not t.is_floating_point():
            raise ConfigError(f"{name}: {key} must be a floating-point tensor; got {t.dtype}.")
        if t.device != tensors[first].device:
            raise ConfigError(
                f"{name}: all tensors must be on one device; "
                f"got {first} on {tensors[first].device}, {key} on {t.device}."
            )


def shape(name: str, key: str, t: Tensor | None, want: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape; None passes."""
    if t is not None and tuple(t.shape) != want:
        raise ConfigError(f"{name}: {key} must have shape {list(want)}; got {list(t.shape)}.")


def integer(value: Any) -> int | None:
    """The integer that ``value`` is, one of numpy's too; None where it is something else."""
    if isinstance(value, int | torch.SymInt):
        return cast(int, value)  # a symbol stays one
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array
        return None


def per_axis(name: str, key: str, value: int | Sequence[int], rank: int) -> list[int]:
    """One integer for each axis from one or a sequence of them."""
    alone = isinstance(value, Tensor) or not isinstance(value, Iterable)
    given: Iterable[Any] = [value] * rank if alone else value  # type: ignore[assignment]
    found = [integer(x) for x in given]
    values = [x for x in found if x is not None]
    if len(values) != rank or len(found) != rank:
        raise ConfigError(
            f"{name}: {key} must be one int or one for each of {rank} axes; got {value!r}."
        )
    return values


def flag_per_axis(name: str, key: str, value: bool | Sequence[bool], rank: int) -> list[bool]:
    """One truth value for each axis from one or a sequence of them."""
    given = list(value) if isinstance(value, Iterable) else [value] * rank
    if len(given) != rank or not all(_is_flag(x) for x in given):
        raise ConfigError(
            f"{name}: {key} must be one bool or one for each of {rank} axes; got {value!r}."
        )
    return [bool(x) for x in given]


def _is_flag(value: Any) -> bool:
    """Whether ``value`` is a truth value, Python's or numpy's (which has no base in common)."""
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
