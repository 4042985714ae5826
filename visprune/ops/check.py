# SPDX-License-Identifier: Apache-2.0
"""Input checks and the choice of a backend, shared by the operators of ``visprune.ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

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


def per_axis(
    name: str, key: str, value: int | bool | Sequence[int | bool], rank: int, kind: type
) -> list[int | bool]:
    """One value for each axis from one value or a sequence of them; integers of NumPy's too."""
    values = [value] * rank if isinstance(value, int | Integral) else list(value)
    values = [x if isinstance(x, int) or not isinstance(x, Integral) else int(x) for x in values]
    if len(values) != rank or not all(isinstance(x, kind) for x in values):
        raise ConfigError(
            f"{name}: {key} must be one {kind.__name__} or one for each of {rank} axes; "
            f"got {value!r}."
        )
    return values
