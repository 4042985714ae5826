# SPDX-License-Identifier: Apache-2.0
"""The form in which a kernel folder shows its operators to the shared test and bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One named input of one operator.

    Attributes:
        op: the custom op, called as ``op(**inputs, backend=...)``.
        reference: the truth, called as ``reference(**inputs)``, in the dtype it is given.
        make: inputs from a seeded generator; floating tensors of any shape.
        grads: names of the inputs whose gradients exist.
        exact: the result is integer and must be equal.
        triton: small enough for the interpreter.
    """

    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make: Callable[[torch.Generator], Inputs]
    grads: tuple[str, ...] = ()
    exact: bool = False
    triton: bool = True

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        """Seeded inputs with the differentiable and floating ones in ``dtype``."""
        made = self.make(torch.Generator().manual_seed(seed))
        return cast(made, dtype)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same inputs with floating tensors in ``dtype``."""
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, root mean square) difference; (0, 0) for empty tensors."""
    if truth.numel() == 0:
        return 0.0, 0.0
    diff = (got.double() - truth.double()).abs()
    return float(diff.max()), float(diff.square().mean().sqrt())
