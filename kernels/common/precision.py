# SPDX-License-Identifier: Apache-2.0
"""In which precision an operator computes: fp32 at least, whatever surrounds it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def wide(t: Tensor) -> Tensor:
    """fp32 for half types, so that products accumulate in fp32; fp64 stays."""
    return t if t.dtype == torch.float64 else t.float()


def wide_or_other(value: Any) -> Any:
    """:func:`wide` of a floating-point tensor; anything else as it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return wide(value) if floating else value


def outside_autocast(kind: str) -> AbstractContextManager[Any]:
    """A block that autocast on the device type ``kind`` does not reach into.

    The body of an operator still runs under the autocast of its caller, which would make bf16
    products of what it has just widened. A compiler calls the body without autocast, so the two
    would differ.
    """
    # `meta` and its like know no autocast.
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def uncast(function: Function) -> Function:
    """The same function of tensors, computed :func:`outside_autocast`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        with outside_autocast(next(t.device.type for t in given if isinstance(t, Tensor))):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op`` of a function that writes to no argument, :func:`uncast`."""

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(name, uncast(function), mutates_args=(), schema=schema)

    return register
