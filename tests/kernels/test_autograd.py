# SPDX-License-Identifier: Apache-2.0
"""``kernels.common.autograd``: gradients of an operator that a schema has defined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from visprune.kernels.common.autograd import differentiable


@pytest.fixture(scope="module")
def scaled() -> Any:
    """``x * y * factor``, by schema."""
    torch.library.define("visprune_test::scaled", "(Tensor x, Tensor? y, float factor) -> Tensor")

    @torch.library.impl("visprune_test::scaled", "cpu")
    def forward(x: Tensor, y: Tensor | None, factor: float) -> Tensor:
        return x * (1 if y is None else y) * factor

    @torch.library.register_fake("visprune_test::scaled")
    def fake(x: Tensor, y: Tensor | None, factor: float) -> Tensor:
        return torch.empty_like(x)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.factor = inputs[2]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        if y is None:
            return grad * ctx.factor, None, None
        return grad * y * ctx.factor, grad * x * ctx.factor, None

    differentiable("visprune_test::scaled", setup, backward)
    return torch.ops.visprune_test.scaled.default


def test_gradients_of_what_asks_for_them(scaled: Any) -> None:
    x, y = torch.arange(3.0).requires_grad_(), torch.full((3,), 2.0).requires_grad_()
    got = torch.autograd.grad(scaled(x, y, 3.0).sum(), (x, y))
    assert torch.equal(got[0], torch.full((3,), 6.0))
    assert torch.equal(got[1], 3 * torch.arange(3.0))
    assert torch.equal(torch.autograd.grad(scaled(x, None, 3.0).sum(), x)[0], torch.full((3,), 3.0))
    assert not scaled(x.detach(), None, 3.0).requires_grad
    with torch.no_grad():
        assert not scaled(x, y, 3.0).requires_grad


def test_opcheck(scaled: Any) -> None:
    x = torch.arange(3.0).requires_grad_()
    torch.library.opcheck(scaled, (x, torch.ones(3), 2.0))
