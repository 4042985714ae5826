# SPDX-License-Identifier: Apache-2.0
"""Gradients of an operator that is defined by its schema, with little time per call.

A layer over a small picture is as short as what surrounds it: with ``torch.library.custom_op`` and
``register_autograd`` a call costs 60 us and, with its gradient, 320 us; defined by schema and
differentiated here, 15 us and 160 us (one AVX2 thread, an operator that does nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .precision import outside_autocast, wide_or_other


def differentiable(
    name: str, setup: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Any]
) -> None:
    """Register the gradient of ``name`` ("namespace::op"), which a schema has defined.

    Args:
        name: the operator; no keyword-only arguments.
        setup: called with (ctx, inputs, output), as ``register_autograd`` does.
        backward: called with (ctx, *gradients of the outputs); one gradient for each input.
    """
    namespace, short = name.split("::")
    op = getattr(getattr(torch.ops, namespace), short).default

    def below(args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    class Differentiable(torch.autograd.Function):
        """The operator as autograd sees it."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            out = below(args)
            setup(ctx, args, out)
            return out

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*args: Any) -> Any:
        wanted = (isinstance(a, Tensor) and a.requires_grad for a in args)
        if torch.is_grad_enabled() and any(wanted):
            return Differentiable.apply(*args)
        return below(args)

    torch.library.impl(name, "Autograd", call)


def watched() -> bool:
    """Whether somebody traces, counts or casts the operators.

    Where nobody does and no gradient is asked for, what an operator computes may be called without
    it: its call is a good part of a short one's time.
    """
    seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return seen or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")


def gradients_of(
    plain: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for a backward with ``create_graph=True``.

    An operator that computes the gradients has none of its own. The same function written in
    operators of PyTorch has all orders, at the cost of what it writes out.

    Args:
        plain: that function.
        inputs: its arguments, as they were saved.
        grads: the gradient of each of its outputs; None for none.

    Returns:
        One gradient for each input; None where none is wanted.
    """
    with torch.enable_grad():
        # Apart, as one tensor may be several arguments.
        own = [t.view_as(t) if _wants_gradient(t) else t for t in inputs]
        with outside_autocast(next(t.device.type for t in own if isinstance(t, Tensor))):
            found = plain(*(wide_or_other(t) for t in own))
        outs = found if isinstance(found, tuple) else (found,)
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
        wanted = [t for t in own if _wants_gradient(t)]
        parts = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g.to(o.dtype) for o, g in pairs],
            create_graph=True, materialize_grads=True,
        )  # fmt: skip
    left = iter(parts)
    return [next(left) if _wants_gradient(t) else None for t in own]


def _wants_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
