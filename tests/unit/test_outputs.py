# SPDX-License-Identifier: Apache-2.0
"""Output hooks: no logits for dropped tokens, their labels out of the loss, everything put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visprune.core.slots import SlotTable, assemble
from visprune.core.trace import Trace
from visprune.machine.decoder.outputs import OutputHooks

LENGTH, VOCAB = 5, 7


class Model(nn.Module):
    """As much of a transformers model as the hooks see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, VOCAB)
        self.rows: list[int] = []
        self.head.register_forward_hook(lambda _, args, out: self.rows.append(args[0].shape[1]))

    @property
    def loss_function(self) -> Any:
        return getattr(self, "_loss_function", loss)


def loss(logits: Tensor, labels: Tensor | None, vocab_size: int, shift_labels: Tensor | None = None,
         **kwargs: Any) -> Tensor:  # fmt: skip
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(logits.view(-1, vocab_size), shift_labels.reshape(-1))


@pytest.fixture
def table() -> SlotTable:
    """Two rows of five tokens: the first keeps 0, 3, 4, the second 2, 4 (and a slot of padding)."""
    rel, real = assemble([torch.tensor([0, 3, 4]), torch.tensor([2, 4])], "left")
    return SlotTable.identity(2, LENGTH, None, torch.device("cpu")).gather(rel, real)


def run(model: Model, hooks: OutputHooks, table: SlotTable, trace: Trace, hidden: Tensor) -> Tensor:
    whole = hooks.expand(table, hidden, trace)
    assert whole.shape == (2, LENGTH, 3)
    return model.head(whole)


def test_logits_are_where_the_tokens_were(table: SlotTable) -> None:
    model, trace = Model(), Trace()
    hooks = OutputHooks(model, model.head)
    handles = hooks.install()
    hidden = torch.randn(2, 3, 3)
    with torch.no_grad():
        logits = run(model, hooks, table, trace, hidden)
        want = nn.functional.linear(hidden, model.head.weight, model.head.bias)
    assert model.rows == [3]  # the head worked on three slots, not on five tokens
    assert logits.shape == (2, LENGTH, VOCAB)
    torch.testing.assert_close(logits[0, [0, 3, 4]], want[0])
    torch.testing.assert_close(logits[1, [2, 4]], want[1, 1:])
    # Rows of dropped tokens repeat the one before; in front of all, the first.
    torch.testing.assert_close(logits[0, [1, 2]], want[0, [0, 0]])
    torch.testing.assert_close(logits[1, [0, 1, 3]], want[1, [1, 1, 1]])
    for handle in handles:
        handle.remove()
    hooks.remove()


@pytest.mark.parametrize("how", ["positional", "keyword", "shifted"])
def test_labels_of_dropped_tokens_are_ignored_and_counted(table: SlotTable, how: str) -> None:
    model, trace = Model(), Trace()
    hooks = OutputHooks(model, model.head)
    handles = hooks.install()
    labels = torch.arange(10).reshape(2, LENGTH) % VOCAB
    logits = run(model, hooks, table, trace, torch.randn(2, 3, 3, requires_grad=True))
    if how == "positional":
        got = model.loss_function(logits, labels, VOCAB)
    elif how == "keyword":
        got = model.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)
    else:
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        given = {"logits": logits, "labels": None, "shift_labels": shifted}
        got = model.loss_function(**given, vocab_size=VOCAB)
    # Token i predicts label i + 1: 0 and 3 do in the first row, 2 in the second.
    rows, places = [0, 0, 1], [0, 3, 2]
    want = nn.functional.cross_entropy(logits[rows, places], labels[rows, [1, 4, 3]])
    torch.testing.assert_close(got, want)
    assert trace.ignored_labels == 2 + 3
    got.backward()
    assert model.head.weight.grad is not None
    assert bool(model.head.weight.grad.isfinite().all())
    assert labels.min() >= 0  # the user's tensor is not written to
    for handle in handles:
        handle.remove()
    hooks.remove()


def test_without_a_shorter_sequence_nothing_happens() -> None:
    model = Model()
    hooks = OutputHooks(model, model.head)
    handles = hooks.install()
    whole = SlotTable.identity(2, LENGTH, None, torch.device("cpu"))
    logits = run(model, hooks, whole, Trace(), torch.randn(2, LENGTH, 3))
    assert model.rows == [LENGTH]
    assert bool(logits.isfinite().all())
    for handle in handles:
        handle.remove()
    hooks.remove()


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_is_put_back(own: bool) -> None:
    model = Model()

    def mine(*args: Any, **kwargs: Any) -> Any:
        return "mine"

    if own:
        model._loss_function = mine  # type: ignore[assignment]
    before = dict(vars(model))
    hooks = OutputHooks(model, model.head)
    handles = hooks.install()
    if own:
        assert model.loss_function(torch.zeros(1), None) == "mine"  # still the user's
    for handle in handles:
        handle.remove()
    hooks.remove()
    hooks.remove()
    assert vars(model) == before


def test_only_the_last_rows_pass_untouched(table: SlotTable) -> None:
    model = Model()
    hooks = OutputHooks(model, model.head)
    handles = hooks.install()
    whole = hooks.expand(table, torch.randn(2, 3, 3), Trace())
    assert model.head(whole[:, -1:]).shape == (2, 1, VOCAB)
    assert model.rows == [1]
    for handle in handles:
        handle.remove()
    hooks.remove()
