# SPDX-License-Identifier: Apache-2.0
"""Properties of every method that acts behind an encoder, on tensors alone.

The signals are read from made-up queries, keys and states by the signals themselves, so a method
joins by its row in the registry.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract.cases import EVERY, INSIDE, NO_BUDGET, everything, few, takes
from tests.unit.test_registry_methods import plain
from visprune.core import Budget, Context, ModelSpec, PruningMethod, Selection, Stage, VisualTokens
from visprune.core.signals import (
    DecoderSeen,
    DecoderSignal,
    EncoderSeen,
    EncoderSignal,
    PictureSignal,
    Signal,
    TokenSignal,
)
from visprune.machine.choose import choose

WIDTH, HEADS, BEFORE, AFTER = 16, 2, 3, 5
GRID = (4, 6)
SPEC = ModelSpec(family="llava", num_layers=32, has_cls=True, multi_axis_rope=False,
                 encoder_layers=24, encoder_width=WIDTH, decoder_width=WIDTH)  # fmt: skip
NO_CLASS = dataclasses.replace(SPEC, has_cls=False)
# May keep fewer than they are told: the largest grid that fits.
BELOW = ("pool",)
# What they recycle of the dropped tokens comes on top of the budget, as published.
ABOVE = ("sparsevlm",)
# Where nothing tells tokens apart, these keep the first.
FIRST = ("fastv", "pyramiddrop", "fastervlm", "hiprune", "gprune", "scope", "idpruner", "divprune")

every_method = pytest.mark.parametrize("name", EVERY)


@dataclass
class World:
    """What models would show of B pictures of N patches."""

    tokens: VisualTokens
    encoder: EncoderSeen
    decoder: DecoderSeen
    pixels: Tensor

    @classmethod
    def make(cls, batch: int = 3, grid: tuple[int, int] = GRID, constant: bool = False) -> World:
        """Random ones, or pictures whose patches are all alike."""
        count = grid[0] * grid[1]
        length = BEFORE + count + AFTER
        draw = torch.Generator().manual_seed(7)

        def made(*shape: int, axis: int = 1, span: slice = slice(None)) -> Tensor:
            x = torch.randn(*shape, generator=draw)
            if constant:
                x.movedim(axis, 0)[span] = x.movedim(axis, 0)[span][:1].clone()
            return x

        at = slice(BEFORE, BEFORE + count)
        head = WIDTH // HEADS
        turn = torch.outer(torch.arange(length), 2.0 ** -torch.arange(head // 2)).repeat(1, 2)[None]
        hidden = made(batch, length, WIDTH, span=at)
        slots = torch.arange(length)
        visual = ((slots >= BEFORE) & (slots < BEFORE + count)).expand(batch, -1)
        everywhere = torch.ones(batch, length, dtype=torch.bool)
        query, key, value = (made(batch, HEADS, length, head, axis=2, span=at) for _ in range(3))
        decoder = DecoderSeen(
            hidden=hidden, last=torch.full((batch,), length - 1), visual=visual, valid=everywhere,
            prompt=everywhere, query=query, key=key, value=value, scale=head**-0.5,
            norm=lambda x: x / x.norm(dim=-1, keepdim=True),
            rotary=lambda: (turn.cos(), turn.sin()),
        )  # fmt: skip
        patches = slice(1, None)
        encoder = EncoderSeen(
            prefix=1, has_cls=True, hidden=made(batch, 1 + count, WIDTH, span=patches),
            query=made(batch, HEADS, 1 + count, head, axis=2, span=patches),
            key=made(batch, HEADS, 1 + count, head, axis=2, span=patches), scale=head**-0.5,
        )  # fmt: skip
        axes = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        pos = torch.stack([torch.zeros(grid, dtype=torch.long), *axes], -1).view(1, count, 3)
        tokens = VisualTokens(hidden[:, at], torch.ones(batch, count), pos.expand(batch, -1, -1))
        pixels = torch.randn(batch, 3, 8, 8, generator=draw)
        shape = (batch, 1 + count, WIDTH)
        encoder.entering, encoder.before = (made(*shape, span=patches) for _ in range(2))
        return cls(tokens, encoder, decoder, pixels)

    def alone(self, place: int) -> World:
        """One of its pictures."""

        def part(x: Any) -> Any:
            return x[place : place + 1] if isinstance(x, Tensor) else x

        def parted(x: Any) -> Any:
            fields = {f.name: part(getattr(x, f.name)) for f in dataclasses.fields(x)}
            return type(x)(**fields)

        return World(
            parted(self.tokens), parted(self.encoder), parted(self.decoder), part(self.pixels)
        )

    def signals(self, stage: Stage) -> dict[Signal, Any]:
        """What a stage is shown."""
        found: dict[Signal, Any] = {}
        for signal in stage.signals:
            if isinstance(signal, EncoderSignal):
                found[signal] = signal.read(self.encoder)
            elif isinstance(signal, DecoderSignal):
                whole, axis = signal.read(self.decoder), signal.token_dim
                count = self.tokens.num_tokens
                found[signal] = whole if axis is None else whole.narrow(axis, BEFORE, count)
            elif isinstance(signal, TokenSignal):
                found[signal] = signal.read(self.tokens)
            elif isinstance(signal, PictureSignal):
                found[signal] = tuple(signal.read(x) for x in self.pixels)
        return found


def chosen(method: PruningMethod, world: World, spec: ModelSpec = SPEC) -> list[Selection]:
    """What every stage behind the encoder chooses of all tokens; networks are of a seed."""
    out = []
    torch.manual_seed(11)
    learned = method.build_learned(spec)
    for number, stage in enumerate(method.schedule(spec)):
        if stage.site.kind != "encoder":
            own = None if learned is None else learned[number]
            context = Context(stage=number, signals=world.signals(stage), learned=own)
            out.append(choose(method, stage, world.tokens, context))
    return out


def stages(method: PruningMethod, spec: ModelSpec = SPEC) -> list[Stage]:
    return [stage for stage in method.schedule(spec) if stage.site.kind != "encoder"]


def check(made: Selection, world: World, ordered: bool = True) -> None:
    """A selection is a map of tokens that are there to slots that are there."""
    count = world.tokens.num_tokens
    for row, kept in zip(made.index.tolist(), made.counts, strict=True):
        assert all(0 <= token < count for token in row[:kept])
        assert all(token == -1 for token in row[kept:])
        assert len(set(row[:kept])) == kept  # no token has two places
        if not made.merges and ordered:
            assert row[:kept] == sorted(row[:kept])
    source, slot, weight = made.entries()
    assert bool(torch.isfinite(weight).all())
    assert bool((slot < torch.tensor(made.counts)[:, None]).all())
    assert bool(((source >= 0) & (source < count))[slot >= 0].all())
    assert bool(torch.isfinite(made.reduce(world.tokens.features)).all())


def same(a: Selection, b: Selection) -> None:
    assert a.counts == b.counts
    assert torch.equal(a.index[:, : max(a.counts)], b.index[:, : max(b.counts)])
    assert torch.allclose(a.matrix(), b.matrix(), atol=1e-5)


def agree(name: str, made: Selection, want: int) -> None:
    """As many slots as the budget says, in every picture."""
    if name in BELOW:
        assert max(made.counts) <= want
    elif name in ABOVE:
        assert all(want <= kept <= made.num_tokens for kept in made.counts)
    else:
        assert made.counts == [want] * 3


@pytest.mark.parametrize("keep", [1, 2, 5, 23])
@every_method
def test_as_many_stay_as_were_asked_for(name: str, keep: int) -> None:
    method, world = visprune.get_method(name, **few(name, keep)), World.make()
    for stage, made in zip(stages(method), chosen(method, world), strict=True):
        check(made, world)
        if stage.budget is None:
            continue
        want = stage.budget.slots(world.tokens.num_tokens, world.tokens.num_tokens)
        agree(name, made, want)


@every_method
def test_what_decides_itself_keeps_something(name: str) -> None:
    if not takes(name) >= {"num_keep", "keep_ratio"}:
        return
    try:
        method = visprune.get_method(name)
    except visprune.VispruneError:
        return  # it needs a budget
    for made in chosen(method, world := World.make()):
        check(made, world)
        assert all(1 <= kept <= world.tokens.num_tokens for kept in made.counts)


@every_method
def test_a_batch_is_its_pictures(name: str) -> None:
    method, world = visprune.get_method(name, **few(name, 7)), World.make()
    together = chosen(method, world)
    for place in range(3):
        for whole, one in zip(together, chosen(method, world.alone(place)), strict=True):
            same(whole.row(place), one)


@every_method
def test_a_constant_picture(name: str) -> None:
    method, world = visprune.get_method(name, **few(name, 6)), World.make(constant=True)
    for stage, made, again in zip(
        stages(method), chosen(method, world), chosen(method, world), strict=True
    ):
        check(made, world)
        same(made, again)
        if stage.budget is not None:
            want = stage.budget.slots(world.tokens.num_tokens, world.tokens.num_tokens)
            agree(name, made, want)
            if name in FIRST:  # ties keep the lower index
                assert made.index.tolist() == [list(range(want))] * 3


@every_method
def test_a_picture_of_one_token(name: str) -> None:
    method, world = visprune.get_method(name, **few(name, 1)), World.make(grid=(1, 1))
    for stage, made in zip(stages(method), chosen(method, world), strict=True):
        check(made, world)
        if stage.budget is not None:
            assert made.counts == [1] * 3


@every_method
def test_more_budget_than_tokens_keeps_all(name: str) -> None:
    world = World.make()
    for params in (few(name, 100), everything(name)):
        if NO_BUDGET.get(name) or params.get("keep_ratio", 1.0) < 1.0:
            continue
        method = visprune.get_method(name, **params)
        for stage, made in zip(stages(method), chosen(method, world), strict=True):
            if isinstance(stage.budget, Budget):
                whole = torch.eye(world.tokens.num_tokens).expand(3, -1, -1)
                assert torch.equal(made.matrix(), whole)


@every_method
def test_half_precision(name: str) -> None:
    method, world = visprune.get_method(name, **few(name, 5)), World.make()
    for shown in (world.encoder, world.decoder):
        for field in dataclasses.fields(shown):
            value = getattr(shown, field.name)
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(shown, field.name, value.bfloat16())
    tokens = dataclasses.replace(world.tokens, features=world.tokens.features.bfloat16())
    world = dataclasses.replace(world, tokens=tokens)
    for made in chosen(method, world):
        check(made, world)


@every_method
def test_without_a_class_token(name: str) -> None:
    method, world = visprune.get_method(name, **few(name, 5)), World.make()
    needed = [signal for stage in stages(method, NO_CLASS) for signal in stage.needs]
    if any("cls_token" in signal.requires for signal in needed):
        return  # refused, which test_registry_methods.py looks at
    for made in chosen(method, world, NO_CLASS):
        check(made, world)


# Inside an encoder -------------------------------------------------------------------------------


def first_cut(method: PruningMethod, world: World) -> Selection:
    """What the first stage that shortens anything makes of all patches; of none, the last."""
    torch.manual_seed(11)
    learned, count = method.build_learned(SPEC), world.tokens.num_tokens
    made, carried = (
        Selection.identity(len(world.tokens.size), count, world.tokens.features.device),
        None,
    )
    for number, stage in enumerate(method.schedule(SPEC)):
        context = Context(
            stage=number, signals=world.signals(stage), original=count, prefix=1, carried=carried,
            layer=stage.site.resolve(SPEC.encoder_layers), num_layers=SPEC.encoder_layers,
            learned=None if learned is None else learned[number],
        )  # fmt: skip
        made = choose(method, stage, world.tokens, context)
        if made.num_slots < count:
            break
        carried = made.carried
    return made


@pytest.mark.parametrize("name", INSIDE)
def test_pictures_inside_an_encoder(name: str) -> None:
    """Of noise, of patches that are all alike, and of one patch."""
    method = visprune.get_method(name, **plain(name))
    for world in (World.make(), World.make(constant=True), World.make(grid=(1, 1))):
        made = first_cut(method, world)
        check(made, world, name != "dynamicvit")  # best first, as published: no place is read there
        same(made, first_cut(method, world))
        assert len(set(made.counts)) == 1
        for place in range(3):
            same(made.row(place), first_cut(method, world.alone(place)))
    assert first_cut(method, World.make(grid=(1, 1))).counts == [1] * 3
    if name in ("topk", "spatten", "ipcv"):  # ties keep the lower index
        made = first_cut(method, World.make(constant=True))
        assert made.index.tolist() == [list(range(made.num_slots))] * 3
