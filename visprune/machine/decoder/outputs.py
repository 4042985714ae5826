# SPDX-License-Identifier: Apache-2.0
"""Give outputs of a shortened sequence their outer length back: hidden states, logits, loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visprune.core.slots import SlotTable
from visprune.core.trace import Trace

IGNORE = -100


class OutputHooks:
    """Hooks on the output head and the loss of one model.

    Rows of dropped tokens are NaN in ``last_hidden_state`` and ``logits``: they were not computed,
    and nothing may be read from them unnoticed. (Under grad mode hidden rows are zero instead,
    since NaN would reach the head's weight gradient; logits are NaN all the same.) Labels that a
    dropped token would have predicted are left out of the loss and counted in the trace.
    """

    def __init__(self, model: Any, head: nn.Module) -> None:
        self.model, self.head = model, head
        self.table: SlotTable | None = None
        self._kept: Tensor | None = None
        self._trace: Trace | None = None
        self._expand_logits = False
        self._had_loss: tuple[bool, Any] | None = None

    def install(self) -> list[Any]:
        """Attach; returns the handles of the head's hooks."""
        self._had_loss = (
            "_loss_function" in vars(self.model),
            vars(self.model).get("_loss_function"),
        )
        original = getattr(self.model, "loss_function", None)
        if original is not None:
            self._loss = original
            self.model._loss_function = self._masked_loss
        return [
            self.head.register_forward_pre_hook(self._shrink),
            self.head.register_forward_hook(self._grow),
        ]

    def remove(self) -> None:
        """Put the loss back."""
        if self._had_loss is not None:
            had, value = self._had_loss
            if had:
                self.model._loss_function = value
            elif "_loss_function" in vars(self.model):
                del self.model._loss_function
            self._had_loss = None
        self.forget()

    def forget(self) -> None:
        """Nothing was dropped in the current forward."""
        self.table = self._kept = self._trace = None

    def expand(self, table: SlotTable, hidden: Tensor, trace: Trace) -> Tensor:
        """Return hidden states ``[B, P, D]`` at their places in ``[B, S, D]``."""
        self.table, self._trace, self._kept = table, trace, None
        return table.scatter(hidden, 0.0 if torch.is_grad_enabled() else float("nan"))

    @property
    def kept(self) -> Tensor | None:
        """Which input tokens reached the head, ``[B, S]``; ``None`` if all did."""
        if self.table is None or not self.table.shortened:
            return None
        if self._kept is None:
            self._kept = self.table.kept()
        return self._kept

    def _shrink(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the head: compute no logits for dropped tokens."""
        table, x = self.table, args[0]
        self._expand_logits = (
            table is not None and table.shortened and x.dim() == 3 and x.shape[1] == table.length
        )
        if table is None or not self._expand_logits:
            return None
        index = table.index.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return (x.gather(1, index), *args[1:])

    def _grow(self, head: nn.Module, args: Any, logits: Tensor) -> Any:
        """After the head: logits at their places, NaN elsewhere."""
        if self.table is None or not self._expand_logits:
            return None
        self._expand_logits = False
        return self.table.scatter(logits, float("nan"))

    def _masked_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, without the labels that dropped tokens would have predicted."""
        kept = self.kept
        if kept is not None:
            if len(args) > 1:
                args = (args[0], self._ignore(args[1], kept, shift=True), *args[2:])
            elif kwargs.get("labels") is not None:
                kwargs["labels"] = self._ignore(kwargs["labels"], kept, shift=True)
            if kwargs.get("shift_labels") is not None:
                kwargs["shift_labels"] = self._ignore(kwargs["shift_labels"], kept, shift=False)
        return self._loss(*args, **kwargs)

    def _ignore(self, labels: Tensor, kept: Tensor, *, shift: bool) -> Tensor:
        if labels is None or labels.shape != kept.shape:
            return labels
        kept = kept.to(labels.device)
        lost = ~kept
        if shift:
            lost = torch.cat([torch.zeros_like(lost[:, :1]), ~kept[:, :-1]], dim=1)
        if self._trace is not None:
            self._trace.ignored_labels = int((lost & (labels != IGNORE)).sum())
        return labels.masked_fill(lost, IGNORE)
