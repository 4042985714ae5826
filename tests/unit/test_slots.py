# SPDX-License-Identifier: Apache-2.0
"""Slots: gather, scatter back, pad rows of different length."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from visprune.core.slots import SlotTable, assemble, gather_sequence
from visprune.machine.decoder.outputs import grown

CPU = torch.device("cpu")


@st.composite
def shortenings(draw: st.DrawFn) -> tuple[int, list[torch.Tensor], str]:
    """(length, kept slots of each row, padding side)."""
    length = draw(st.integers(1, 10))
    subset = st.lists(st.integers(0, length - 1), unique=True, min_size=1).map(sorted)
    rows = [torch.tensor(row) for row in draw(st.lists(subset, min_size=1, max_size=4))]
    return length, rows, draw(st.sampled_from(["left", "right"]))


@given(shortenings())
def test_assemble_pads_to_the_longest(case: tuple[int, list[torch.Tensor], str]) -> None:
    _, rows, side = case
    rel, real = assemble(rows, side)
    assert rel.shape == real.shape == (len(rows), max(map(len, rows)))
    for row, got, there in zip(rows, rel, real, strict=True):
        assert torch.equal(got[there], row)
        gap = rel.shape[1] - len(row)
        padded = there[:gap] if side == "left" else there[len(row) :]
        assert not bool(padded.any())


@given(shortenings())
def test_a_table_knows_what_it_keeps(case: tuple[int, list[torch.Tensor], str]) -> None:
    length, rows, side = case
    rel, real = assemble(rows, side)
    table = SlotTable.identity(len(rows), length, None, CPU).gather(rel, real)
    want = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        want[number, row] = True
    assert torch.equal(table.kept(), want)
    assert table.padded == (len({len(row) for row in rows}) > 1)
    assert table.shortened == (not bool(want.all()))
    last = table.index.gather(1, table.last_valid()[:, None])[:, 0]
    assert last.tolist() == [int(row[-1]) for row in rows]


@given(shortenings())
def test_rows_of_dropped_tokens_repeat_the_one_before(
    case: tuple[int, list[torch.Tensor], str],
) -> None:
    length, rows, side = case
    rel, real = assemble(rows, side)
    table = SlotTable.identity(len(rows), length, None, CPU).gather(rel, real)
    x = torch.arange(float(len(rows) * length * 2)).reshape(len(rows), length, 2)
    back = grown(table, gather_sequence(x, rel, 1))
    kept = table.kept()
    assert back.shape == x.shape
    assert back.is_contiguous()  # losses call view()
    assert torch.equal(back[kept], x[kept])
    assert torch.equal(table.places() >= 0, kept)
    for row in range(len(rows)):
        there = kept[row].nonzero()[:, 0].tolist()
        for place in range(length):
            before = max((n for n in there if n <= place), default=there[0])
            assert torch.equal(back[row, place], x[row, before])


@given(shortenings())
def test_two_gathers_are_one(case: tuple[int, list[torch.Tensor], str]) -> None:
    length, rows, side = case
    rel, real = assemble(rows, side)
    table = SlotTable.identity(len(rows), length, None, CPU).gather(rel, real)
    # Keep the last valid slot of every row.
    again, there = assemble([slot[None] for slot in table.last_valid()], side)
    short = table.gather(again, there)
    assert short.index[:, 0].tolist() == [int(row[-1]) for row in rows]
    assert not short.padded
    assert int(short.kept().sum()) == len(rows)


def test_padding_of_the_input_is_real_but_not_valid() -> None:
    mask = torch.tensor([[False, True, True], [True, True, True]])
    table = SlotTable.identity(2, 3, mask, CPU)
    assert table.padded
    assert bool(table.real.all())
    assert torch.equal(table.valid, mask)
    assert bool(table.kept().all())
    assert not SlotTable.identity(2, 3, torch.ones(2, 3, dtype=torch.bool), CPU).padded


def test_gather_sequence_along_any_dimension() -> None:
    rel = torch.tensor([[2, 0], [1, 1]])
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(gather_sequence(x, rel, 1), torch.stack([x[0, [2, 0]], x[1, [1, 1]]]))
    ids = torch.arange(3)[None]  # one row for the whole batch
    assert gather_sequence(ids, rel, -1).tolist() == [[2, 0], [1, 1]]
    axes = torch.stack([ids, ids + 10, ids + 20])  # [3, 1, S], as M-RoPE has them
    assert gather_sequence(axes, rel, -1)[1].tolist() == [[12, 10], [11, 11]]
    rotary = x[:1]  # [1, S, d]
    assert torch.equal(gather_sequence(rotary, rel, -2)[1], rotary[0, [1, 1]])


def test_slots_in_another_order_are_put_back_where_nothing_is_gone() -> None:
    # A recycled token stands behind those that were kept; a row may lose none to it.
    table = SlotTable.identity(1, 4, None, CPU)
    rel, real = torch.tensor([[0, 2, 3, 1]]), torch.ones(1, 4, dtype=torch.bool)
    moved = table.gather(rel, real)
    assert moved.shortened
    assert moved.gather(torch.tensor([[0, 1, 2, 3]]), real).shortened
    assert not table.gather(torch.tensor([[0, 1, 2, 3]]), real).shortened
    x = torch.arange(4.0)[None, :, None]
    assert torch.equal(grown(moved, gather_sequence(x, rel, 1)), x)
