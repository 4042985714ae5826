# SPDX-License-Identifier: Apache-2.0
"""``Selection`` is a linear map: it composes, has an identity, conserves mass and un-merges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from visprune.core.selection import Selection
from visprune.errors import ConfigError


@st.composite
def prunings(draw: st.DrawFn, tokens: int | None = None, batch: int | None = None) -> Selection:
    """A selection that keeps tokens as they are, in any order of slots."""
    n = tokens or draw(st.integers(1, 9))
    b = batch or draw(st.integers(1, 3))
    k = draw(st.integers(1, n))
    rows = [draw(st.permutations(range(n)))[:k] for _ in range(b)]
    return Selection(index=torch.tensor(rows), num_tokens=n)


@st.composite
def merges(
    draw: st.DrawFn, tokens: int | None = None, batch: int | None = None, averages: bool = False
) -> Selection:
    """A selection with a slot and a weight for every token; some are dropped."""
    n = tokens or draw(st.integers(1, 9))
    b = batch or draw(st.integers(1, 3))
    k = draw(st.integers(1, n))
    index = torch.tensor([draw(st.permutations(range(n)))[:k] for _ in range(b)])
    lowest = 0 if averages else -1
    dest = torch.tensor(
        [draw(st.lists(st.integers(lowest, k - 1), min_size=n, max_size=n)) for _ in range(b)]
    )
    dest.scatter_(1, index, torch.arange(k).expand(b, -1))  # no slot is empty
    if averages:
        count = torch.zeros(b, k).scatter_add_(1, dest, torch.ones(b, n))
        weight = 1.0 / count.gather(1, dest)
    else:
        # Quarters: sums and products of them are exact in float32.
        parts = st.lists(st.integers(-8, 8), min_size=n, max_size=n)
        weight = torch.tensor([draw(parts) for _ in range(b)]) / 4.0
        weight = torch.where(dest < 0, 0.0, weight)
    return Selection.assign(index, dest, weight)


selections = st.one_of(prunings(), merges())


@st.composite
def chains(draw: st.DrawFn, length: int = 2) -> list[Selection]:
    """Selections that can follow one another."""
    batch = draw(st.integers(1, 3))
    made = [draw(st.one_of(prunings(batch=batch), merges(batch=batch)))]
    while len(made) < length:
        size = made[-1].num_slots
        made.append(draw(st.one_of(prunings(size, batch), merges(size, batch))))
    return made


def features(selection: Selection, width: int = 3) -> Tensor:
    batch = len(selection.index)
    count = batch * selection.num_tokens * width
    return torch.arange(1.0, count + 1).reshape(batch, selection.num_tokens, width)


def same(a: Selection, b: Selection) -> bool:
    return torch.equal(a.index, b.index) and torch.equal(a.matrix(), b.matrix())


@given(selections)
def test_reduce_is_the_matrix_product(selection: Selection) -> None:
    x = features(selection)
    want = selection.matrix() @ x
    assert selection.matrix().shape == (len(x), selection.num_slots, selection.num_tokens)
    torch.testing.assert_close(selection.reduce(x), want)


@given(selections)
def test_every_token_goes_to_one_slot_at_most(selection: Selection) -> None:
    assert int((selection.matrix() != 0).sum(1).max()) <= 1


@given(chains(2))
def test_composition_is_the_product_of_the_matrices(chain: list[Selection]) -> None:
    first, second = chain
    both = first.then(second)
    torch.testing.assert_close(both.matrix(), second.matrix() @ first.matrix())
    assert both.num_tokens == first.num_tokens
    assert both.num_slots == second.num_slots
    assert torch.equal(both.index, first.index.gather(1, second.index))
    x = features(first)
    torch.testing.assert_close(both.reduce(x), second.reduce(first.reduce(x)))
    assert both.merges == (first.merges or second.merges)


@given(chains(3))
def test_composition_is_associative(chain: list[Selection]) -> None:
    a, b, c = chain
    assert same(a.then(b).then(c), a.then(b.then(c)))


@given(selections)
def test_identity_changes_nothing(selection: Selection) -> None:
    batch = len(selection.index)
    before = Selection.identity(batch, selection.num_tokens)
    after = Selection.identity(batch, selection.num_slots)
    assert same(before.then(selection), selection)
    assert same(selection.then(after), selection)
    x = features(selection)
    assert torch.equal(before.reduce(x), x)
    assert torch.equal(before.expand(x), x)
    assert torch.equal(before.matrix(), torch.eye(selection.num_tokens).expand(batch, -1, -1))


@given(merges(averages=True))
def test_averages_conserve_mass(selection: Selection) -> None:
    # Every row sums to one, no token is lost: sizes and size-weighted sums stay.
    rows = selection.matrix().sum(2)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    size = torch.ones(len(selection.index), selection.num_tokens)
    grown = selection.sizes(size)
    torch.testing.assert_close(grown.sum(1), size.sum(1))
    x = features(selection)
    torch.testing.assert_close((selection.reduce(x) * grown[..., None]).sum(1), x.sum(1))
    constant = torch.full_like(x, 2.5)
    torch.testing.assert_close(selection.reduce(constant), constant[:, : selection.num_slots])


@given(selections)
def test_sizes_count_what_went_in(selection: Selection) -> None:
    size = torch.arange(1.0, selection.num_tokens + 1).expand(len(selection.index), -1)
    member = (selection.matrix() != 0) if not selection.merges else None
    if member is None:
        slots = torch.arange(selection.num_slots)[None, :, None]
        member = selection.dest()[:, None] == slots
    assert torch.equal(selection.sizes(size), (member * size[:, None]).sum(2))


@given(prunings())
def test_expand_undoes_a_pruning(selection: Selection) -> None:
    x = features(selection)
    back = selection.expand(selection.reduce(x))
    kept = torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, selection.index, True)
    assert torch.equal(back[kept], x[kept])
    assert bool((back[~kept] == 0).all())
    assert torch.equal(selection.reduce(back), selection.reduce(x))  # a projection


@given(merges(averages=True))
def test_expand_gives_every_token_its_slot(selection: Selection) -> None:
    y = features(selection)[:, : selection.num_slots]
    back = selection.expand(y)
    want = torch.stack([slot[place] for slot, place in zip(y, selection.dest(), strict=True)])
    assert torch.equal(back, want)
    # An average of equal values is that value: reduce is a left inverse of expand.
    torch.testing.assert_close(selection.reduce(back), y)


@given(merges())
def test_expand_leaves_zeros_where_tokens_were_dropped(selection: Selection) -> None:
    y = torch.ones(len(selection.index), selection.num_slots, 2)
    back = selection.expand(y)
    assert torch.equal(back[..., 0] == 0, selection.dest() < 0)


@given(prunings())
def test_keep_sorts_in_raster_order(selection: Selection) -> None:
    kept = Selection.keep(selection.index, selection.num_tokens)
    assert torch.equal(kept.index, selection.index.sort(1).values)
    assert not kept.merges


@given(selections)
def test_dtype_is_that_of_the_features(selection: Selection) -> None:
    x = features(selection)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert selection.reduce(x.to(dtype)).dtype == dtype


def test_merges_accumulate_in_float32() -> None:
    n = 4096
    one = torch.zeros(1, n, dtype=torch.int64)
    index = torch.zeros(1, 1, dtype=torch.int64)
    mean = Selection.assign(index, one, torch.full((1, n), 1.0 / n))
    x = torch.ones(1, n, 1, dtype=torch.bfloat16)
    assert float(mean.reduce(x)) == 1.0


def test_gradients_flow_through_a_merge() -> None:
    dest = torch.tensor([[0, 0, 1, -1]])
    weight = torch.tensor([[0.5, 0.5, 2.0, 0.0]])
    merged = Selection.assign(torch.tensor([[0, 2]]), dest, weight)
    x = torch.ones(1, 4, 1, requires_grad=True)
    merged.reduce(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [0.5, 0.5, 2.0, 0.0]


def test_visionzip_like_rows_may_sum_to_two() -> None:
    dest = torch.tensor([[0, 1, 1, 1]])
    weight = torch.tensor([[1.0, 1.0, 0.5, 0.5]])
    merged = Selection.assign(torch.tensor([[0, 1]]), dest, weight)
    assert merged.matrix().sum(2).tolist() == [[1.0, 2.0]]


ONE = torch.zeros(1, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, dtype=torch.int64), 4), r"int64 \[B, K\], got torch.int64 \(3,\)"),
        ((torch.zeros(1, 3), 4), r"got torch.float32"),
        ((ONE, 4, None, ONE), "source, slot and weight together"),
        ((ONE, 4, torch.ones(1, 2)), r"own is \[1, 1\], got \(1, 2\)"),
        ((ONE, 4, None, ONE, ONE, torch.ones(1, 3)), r"weight is \[1, 1\], got \(1, 3\)"),
    ],
)
def test_shapes_are_checked(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Selection(*arguments)  # type: ignore[arg-type]


def test_selections_that_do_not_fit_do_not_compose() -> None:
    with pytest.raises(ConfigError, match="first selection yields 2 slots, the second takes 3"):
        Selection.keep(torch.tensor([[0, 1]]), 4).then(Selection.identity(1, 3))


def test_sizes_that_were_added_up_with_other_numbers_are_not_taken_for_the_tokens() -> None:
    index, source, slot = torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.tensor([[0]])
    sizes = torch.tensor([[3.0, 4.0, 5.0]])
    merged = Selection.mean(index, source, slot, sizes)
    assert merged.chosen(sizes, 0).size.tolist() == [[7.0, 5.0]]
    plain = Selection.mean(index, source, slot, torch.ones(1, 3))
    assert plain.chosen(sizes, 0).size.tolist() == [[7.0, 5.0]]
    assert plain.chosen(sizes, 0).row(0).size.tolist() == [[7.0, 5.0]]
