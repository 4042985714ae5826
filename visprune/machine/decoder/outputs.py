# SPDX-License-Identifier: Apache-2.0
"""Give outputs of a shortened sequence their outer length back: hidden states, logits, loss.

Outputs have the length of the input. The row of a dropped token repeats that of the last token
before it that is still there, which is what predicts the next word of the shorter sequence: so the
word behind a picture is predicted, and no row is undefined. ``run.trace.index`` says which rows
are computed and which are repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visprune.core.slots import SlotTable
from visprune.core.threads import PerThread
from visprune.core.trace import Trace
from visprune.machine.decoder.forward import Forward

IGNORE = -100


class _Current(PerThread):
    """What the last forward of this thread left.

    Attributes:
        table: its slots; ``None``: nothing was dropped.
        trace: its record.
        hidden: the hidden states that were given back, and the short ones that they were made of.
        grow: the head is at work on the short ones.
    """

    table: SlotTable | None = None
    trace: Trace | None = None
    hidden: tuple[Tensor, Tensor] | None = None
    grow: bool = False


class OutputHooks:
    """Hooks on the output head and the loss of one model.

    The model's own loss leaves out labels that a dropped token would have predicted, and the trace
    counts them: what stands behind a picture was predicted from the last of its tokens.

    Args:
        model: the ``...ForConditionalGeneration``.
        head: its output head.
    """

    def __init__(self, model: Any, head: nn.Module) -> None:
        self.model, self.head = model, head
        self._current = _Current()
        self._had_loss: tuple[bool, Any] | None = None
        self._loss: Any = None

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
        current = self._current
        current.table = current.trace = current.hidden = None
        current.grow = False

    def lengthen(self, fwd: Forward, output: Any, trace: Trace) -> None:
        """Give the decoder's output of a call the length of its input: all collected states."""
        states = getattr(output, "hidden_states", None)
        if states is not None:
            last = states[-1] is output.last_hidden_state
            output.hidden_states = tuple(_whole(fwd, n, len(states), x) for n, x in
                                         enumerate(states))  # fmt: skip
        output.last_hidden_state = self.expand(fwd.table, output.last_hidden_state, trace)
        if states is not None and last:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)

    def expand(self, table: SlotTable, hidden: Tensor, trace: Trace) -> Tensor:
        """Return hidden states ``[B, P, D]`` at the length of the input, ``[B, S, D]``."""
        current = self._current
        current.table, current.trace, current.hidden = table, trace, None
        if not table.shortened or hidden.shape[1] != table.num_slots:
            return hidden  # whole, or the last rows alone
        full = grown(table, hidden)
        current.hidden = (full, hidden)
        return full

    @torch.compiler.disable
    def _shrink(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the head: of the states that were just given back, compute no row twice."""
        current = self._current
        current.grow = False
        if current.hidden is None:
            return None
        full, short = current.hidden
        x = args[0]
        same = x is full or (
            x.shape == full.shape and x.dtype == full.dtype and x.data_ptr() == full.data_ptr()
        )
        if not same:
            return None
        current.grow = True
        return (short, *args[1:])

    @torch.compiler.disable
    def _grow(self, head: nn.Module, args: Any, logits: Tensor) -> Any:
        """After the head: logits at the length of the input."""
        current = self._current
        if not current.grow or current.table is None:
            return None
        current.grow, current.hidden = False, None
        return grown(current.table, logits)

    @torch.compiler.disable
    def _masked_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, without the labels that dropped tokens would have predicted."""
        table = self._current.table
        kept = table.kept() if table is not None and table.shortened else None
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
        if self._current.trace is not None:
            self._current.trace.ignored_labels = int((lost & (labels != IGNORE)).sum())
        return labels.masked_fill(lost, IGNORE)


def grown(table: SlotTable, x: Tensor) -> Tensor:
    """Rows ``[B, P, ...]`` of slots at the length of the input, ``[B, S, ...]``."""
    at = table.readers().to(x.device)
    at = at.reshape(*at.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, at)


def _whole(fwd: Forward, number: int, count: int, x: Tensor) -> Tensor:
    """One of the collected hidden states at the length of the input.

    The n-th is what entered layer n, as its predecessor left it; the last one is the output.
    """
    tables = (
        [fwd.table] if number == count - 1 else [fwd.table_at(number - 1), fwd.table_at(number)]
    )
    states = x.dim() == 4  # as layers hand them on; the last ones are those of the output
    rows = fwd.adapter.as_rows(x) if states else x
    for table in tables:
        if rows.shape[1] == table.num_slots:
            rows = grown(table, rows) if table.shortened else rows
            return fwd.adapter.as_states(rows) if states else rows
    return x
