# SPDX-License-Identifier: Apache-2.0
"""IPCV against the official output, and encoders under it against their layers written out."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.encoders import oracle, small
from tests.encoders.test_checkpointing import alone, gradients, same
from tests.encoders.test_open_clip import pixels, tower
from visprune.core import ModelSpec, Selection, Site, Stage, StepBudget
from visprune.core.signals import EncoderChange, EncoderFeatures
from visprune.errors import BudgetError, ConfigError, UnsupportedModel
from visprune.machine.plan import make_plan
from visprune.methods.ipcv import IPCV, following

GOLDEN = Path(__file__).parents[1] / "golden" / "ipcv"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
GRIDS = {96: (8, 12), 64: (8, 8), 40: (5, 8)}


class Tanh(nn.Module):
    """The MLP of the golden: ``tanh(x W)``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.fc1 = nn.Linear(*weight.shape, bias=False)
        self.fc1.weight.data = weight.T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Of a token."""
        return self.fc1(x).tanh()


def stand_in(case: dict[str, Any], weights: Tensor) -> Any:
    """timm's layers with the golden's parts: attention of the normed states themselves."""
    p, width = case["params"], case["params"]["D"]
    model = timm.models.VisionTransformer(
        img_size=GRIDS[p["n"]], patch_size=1, embed_dim=width, depth=p["depth"], num_heads=1,
        class_token=False, global_pool="avg", pos_embed="none", qkv_bias=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False),
    ).eval()  # fmt: skip
    for block, weight in zip(model.blocks, weights, strict=True):
        block.attn.qkv.weight.data = torch.eye(width).repeat(3, 1)
        block.attn.proj.weight.data = torch.eye(width)
        block.attn.proj.bias.data.zero_()
        block.mlp = Tanh(weight)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
@torch.no_grad()
def test_the_official_output(case: dict[str, Any]) -> None:
    """The official forward as the machine runs it, layer by layer."""
    stored, p = load_file(GOLDEN / case["file"]), case["params"]
    model, chosen = stand_in(case, stored["W"]), []
    method = IPCV(
        keep_ratio=1 - p["ratio"], layer=p["layer"], attention_stabilization=p["AS"],
        top_k=p["Top_K"],
    )  # fmt: skip
    with visprune.prune(model, method) as run:
        run.observe(lambda site, tokens, ctx, selection, seconds: chosen.append(selection))
        model.patch_embed(torch.zeros(1, 3, *GRIDS[p["n"]]))
        x = stored["x"][None]
        for block in model.blocks:
            x = block(x)
        trace = run.trace
    (selection,) = chosen
    assert torch.equal(selection.index[0], stored["kept"])
    got, want = selection.restoration.near[0], stored["neighbours"]
    assert got.shape == want.shape
    assert torch.equal(got.sort(1).values, want.sort(1).values)
    torch.testing.assert_close(x[0], stored["out"], rtol=1e-4, atol=1e-5)
    first, behind = p["layer"], p["layer"] + p["AS"]
    attended, mapped = trace.tokens_per_layer[0], trace.mlp_tokens_per_layer[0]
    assert attended == [p["n"] if n < max(first, behind) else len(stored["kept"])
                        for n in range(p["depth"])]  # fmt: skip
    assert mapped == [p["n"] if n < first else len(stored["kept"]) for n in range(p["depth"])]


# The rule and the layers, written out picture by picture --------------------------------------


def chosen_by_hand(x: Tensor, before: Tensor, keep: int, top_k: int) -> tuple[list[int], Any]:
    """Patches that stay, and for each of the others its neighbours; of one picture ``[N, D]``."""
    moved = [float((a - b).norm()) for a, b in zip(x.double(), before.double(), strict=True)]
    kept = sorted(sorted(range(len(x)), key=lambda i: (-moved[i], i))[:keep])
    near = {}
    for i in range(len(x)):
        if i not in kept:
            far = {j: float((x[i].double() - x[j].double()).norm()) for j in kept}
            near[i] = sorted(kept, key=lambda j: (far[j], j))[:top_k]
    return kept, near


def back_by_hand(kept: list[int], near: Any, start: Tensor, now: Tensor) -> Tensor:
    """All patches ``[N, D]`` of those that stayed ``[K, D]``."""
    at = {i: now[place] for place, i in enumerate(kept)}
    for i, own in near.items():
        at[i] = start[i] + torch.stack([at[j] - start[j] for j in own]).mean(0)
    return torch.stack([at[i] for i in range(len(start))])


def test_the_rule_patch_by_patch() -> None:
    draw = torch.Generator().manual_seed(3)
    x, before, later = (torch.randn(3, 20, 5, generator=draw) for _ in range(3))
    for keep, top_k in ((7, 3), (1, 10), (4, 10), (19, 1), (20, 4)):
        index = Selection.top((x - before).norm(dim=-1), keep).index
        follows = following(x, index, top_k)
        now = torch.stack([one[at] for one, at in zip(later, index, strict=True)])
        got = follows.restore(now)
        for row in range(3):
            kept, near = chosen_by_hand(x[row], before[row], keep, top_k)
            assert index[row].tolist() == kept
            assert follows.gone[row].tolist() == sorted(near)
            for place, i in enumerate(sorted(near)):
                assert [kept[at] for at in follows.near[row, place].tolist()] == near[i]
            torch.testing.assert_close(got[row], back_by_hand(kept, near, x[row], now[row]))
            assert torch.equal(got[row, kept], now[row])  # to the bit
        assert torch.equal(follows.restore(x.gather(1, index[..., None].expand(-1, -1, 5))), x)


def scaled(block: Any, half: int, branch: Tensor) -> Tensor:
    """What a branch adds to the stream, in either of timm's ways to scale it."""
    if hasattr(block, "ls1"):
        return getattr(block, f"ls{half}")(branch)[0]
    gamma = getattr(block, f"gamma_{half}")
    return branch[0] if gamma is None else gamma * branch[0]


def mixed_by_hand(block: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """The first half of a layer of timm, ``[T, D]``."""
    given = {} if rope is None else {"rope": rope}
    return x + scaled(block, 1, block.attn(block.norm1(x[None]), **given))


def mapped_by_hand(block: Any, x: Tensor) -> Tensor:
    """The second half."""
    return x + scaled(block, 2, block.mlp(block.norm2(x[None])))


def encoded_by_hand(
    model: Any, x: Tensor, keep: int, layer: int, steady: int, top_k: int
) -> Tensor:
    """The states behind the last layer, ``[B, P + N, D]``."""
    y, prefix, rope = model.patch_embed(x), model.num_prefix_tokens, None
    y = model._pos_embed(y)
    if isinstance(y, tuple):
        y, rope = y
    y = model.norm_pre(y) if hasattr(model, "norm_pre") else y
    out = []
    for row in y:
        now, before, kept, near, start = row, row, None, None, row
        for number, block in enumerate(model.blocks):
            if number == layer:
                start = now
                kept, near = chosen_by_hand(now[prefix:], before[prefix:], keep, top_k)
                now = torch.cat([now[:prefix], now[prefix:][kept]])
            before = now
            if kept is None or number < layer + steady:
                seen = now
                if kept is not None:
                    whole = back_by_hand(kept, near, start[prefix:], now[prefix:])
                    seen = torch.cat([now[:prefix], whole])
                mixed = mixed_by_hand(block, seen, rope)
                if kept is not None:
                    mixed = torch.cat([mixed[:prefix], mixed[prefix:][kept]])
            else:
                own = None if rope is None else rope[kept]
                mixed = mixed_by_hand(block, now, own)
            now = mapped_by_hand(block, mixed)
        assert kept is not None
        whole = back_by_hand(kept, near, start[prefix:], now[prefix:])
        out.append(torch.cat([now[:prefix], whole]))
    return torch.stack(out)


@pytest.mark.parametrize("steady", [0, 1, 2, 9])
@pytest.mark.parametrize(
    "kind", ["plain", "layer_scale", "registers", "average_no_class", "eva_rope"]
)
@torch.no_grad()
def test_an_encoder_equals_its_layers_written_out(kind: str, steady: int) -> None:
    model = small.small(small.KINDS[kind])
    x, params = small.picture(model), {"keep_ratio": 0.4, "layer": 1, "top_k": 3}
    found: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda m, args, out: found.append(out))
    with visprune.prune(model, "ipcv", attention_stabilization=steady, **params) as run:
        logits, trace = model(x), run.trace
    handle.remove()
    want = encoded_by_hand(model, x, int(0.4 * 24), 1, steady, 3)
    oracle.assert_close(found[0], want)
    # All of it stands behind the last layer: norm, pooling and head are the model's own.
    oracle.assert_close(logits, model.forward_head(model.norm(want)))
    many = min(4, 1 + steady)
    assert trace.tokens_per_layer == [[24] * max(1, many) + [9] * (4 - max(1, many))] * 2
    assert trace.mlp_tokens_per_layer == [[24, 9, 9, 9]] * 2
    assert [kept.tolist() for kept in trace.kept] == [list(range(24))] * 2
    (stage,) = trace.stages
    assert (stage["before"], stage["after"], stage["restored"]) == (24, 9, 3)


# What holds of it ---------------------------------------------------------------------------------

CASES_OF_MACHINE: list[dict[str, Any]] = [
    {"keep_ratio": 0.4, "layer": 2, "attention_stabilization": 0},
    {"keep_ratio": 0.4, "layer": 1, "attention_stabilization": 1},
    {"keep_ratio": 0.01, "layer": 1, "attention_stabilization": 2},  # one patch stays
]
every_case = pytest.mark.parametrize("params", CASES_OF_MACHINE)


@pytest.mark.parametrize("steady", [0, 1, 3])
@pytest.mark.parametrize("kind", sorted(small.KINDS))
@torch.no_grad()
def test_keeping_all_changes_no_bit(kind: str, steady: int) -> None:
    model = small.small(small.KINDS[kind])
    x = small.picture(model)
    want = model(x)
    with visprune.prune(model, "ipcv", keep_ratio=1.0, attention_stabilization=steady) as run:
        assert torch.equal(model(x), want)
        assert run._reducer.latest.away is not None  # the whole path ran
    assert torch.equal(model(x), want)


@every_case
@torch.no_grad()
def test_a_picture_without_anything_on_it(params: dict[str, Any]) -> None:
    model = small.small(small.KINDS["plain"])
    x = torch.zeros_like(small.picture(model))
    with visprune.prune(model, "ipcv", **params):
        both = model(x)
        alone = model(x[:1])
    assert bool(torch.isfinite(both).all())
    oracle.assert_close(both, alone.expand_as(both))


def test_equal_patches_keep_the_lower_index() -> None:
    x = torch.zeros(2, 12, 4)
    index = Selection.top(torch.zeros(2, 12), 5).index
    follows = following(x, index, 3)
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert follows.near.tolist() == [[[0, 1, 2]] * 7] * 2


@every_case
@torch.no_grad()
def test_threads(params: dict[str, Any]) -> None:
    model = small.shrunk(small.KINDS["registers"], depth=4)
    pictures = [small.picture(model, batch=1, seed=seed) for seed in range(8)]
    with visprune.prune(model, "ipcv", **params):
        want = [model(x) for x in pictures]
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(model.__call__, pictures * 2))
    for one, other in zip(got, want * 2, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_features_come_out_on_the_whole_grid() -> None:
    model = small.small(small.KINDS["plain"])
    x = small.picture(model)
    params = {"keep_ratio": 0.4, "layer": 2, "attention_stabilization": 1}
    dense = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
    with visprune.prune(model, "ipcv", **params) as run:
        final, maps = model.forward_intermediates(x, output_fmt="NLC")
        latest = run._reducer.latest
        assert final.shape[1] == 25
        assert torch.equal(maps[0], dense[0])
        assert torch.equal(maps[1], dense[1])
        back = latest.away.selection.restoration
        for number in (2, 3):
            assert maps[number].shape == dense[number].shape
            assert bool((maps[number] != 0).any(-1).all())
        kept = maps[2].gather(1, back.kept[..., None].expand(-1, -1, 48))
        assert torch.equal(maps[2], back.restore(kept))
        with pytest.raises(UnsupportedModel, match=r"layers \[2\] are asked for behind the final"):
            model.forward_intermediates(x, norm=True)
        (last,) = model.forward_intermediates(x, [3], norm=True, output_fmt="NLC")[1]
        assert torch.equal(last, model.norm(maps[3]))


@torch.no_grad()
def test_features_of_open_clip() -> None:
    model, x = tower("plain"), pixels()
    params = {"keep_ratio": 0.4, "layer": 2, "attention_stabilization": 0}
    with visprune.prune(model, "ipcv", **params):
        found = model.forward_intermediates(x, output_fmt="NLC")["image_intermediates"]
        assert {tuple(one.shape) for one in found} == {(2, 25, 32)}
        with pytest.raises(UnsupportedModel, match="normalize_intermediates=False"):
            model.forward_intermediates(x, normalize_intermediates=True)


@pytest.mark.parametrize("steady", [0, 1, 3])
@pytest.mark.parametrize("kind", ["plain", "registers", "siglip", "dinov3", "side_by_side"])
def test_the_count_is_what_a_counter_counts(kind: str, steady: int) -> None:
    model = small.small(small.KINDS[kind])
    x, whole = small.picture(model), visprune.prune(model, "keep_all")
    dense = whole.cost(x).vision
    whole.remove()
    parts = [m for m in model.modules() if hasattr(m, "fused_attn")]
    for part in parts:  # counters do not know the fused one on a CPU
        part.fused_attn = False
    params = {"keep_ratio": 0.4, "layer": 1, "attention_stabilization": steady}
    try:
        with visprune.prune(model, "ipcv", **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(x)
            cost = run.cost()
    finally:
        for part in parts:
            part.fused_attn = True
    counted = counter.get_total_flops() / 2
    distances = 2 * (24 - 9) * 9 * 48  # the products of the rule, which the counter sees too
    assert abs(counted - distances - cost.vision) <= 1e-3 * cost.vision
    saves = steady < 3 or kind != "side_by_side"  # side by side, an MLP sees what attention sees
    assert (cost.vision < dense) == saves
    assert cost.selection == run.trace.selection_macs
    change = (24 + getattr(model, "num_prefix_tokens", 0)) * 48
    assert cost.selection == 2 * (change + (24 - 9) * 48 * (9 + (1 + steady) * 9))


# What it is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "kind", "match"),
    [
        ({"keep_ratio": 0.0}, BudgetError, r"in \(0, 1\]; got 0.0"),
        ({"keep_ratio": 1.5}, BudgetError, "got 1.5"),
        ({"layer": 0}, ConfigError, "1 or more, or a fraction.*got 0"),
        ({"layer": -0.5}, ConfigError, "got -0.5"),
        ({"top_k": 0}, ConfigError, "top_k is a whole number of at least 1, got 0"),
        ({"attention_stabilization": -1}, ConfigError, "of at least 0, got -1"),
        ({"attention_stabilization": 1.5}, ConfigError, "1.5"),
        ({"num_keep": 5}, ConfigError, "no parameter 'num_keep'"),
    ],
)
def test_bad_parameters(params: dict[str, Any], kind: Any, match: str) -> None:
    with pytest.raises(kind, match=match):
        visprune.get_method("ipcv", **params)


SPEC = ModelSpec("llava", num_layers=8, has_cls=True, multi_axis_rope=False, encoder_layers=6,
                 encoder_width=8, encoder_end=4)  # fmt: skip
HALF = StepBudget(keep_ratio=0.5)


class Made(IPCV):
    """With stages of a test's own."""

    stages: tuple[Stage, ...] = ()

    def schedule(self, spec: ModelSpec) -> tuple[Stage, ...]:
        """Those."""
        return self.stages


def made(*stages: Stage) -> Made:
    method = Made()
    object.__setattr__(method, "stages", stages)
    return method


def test_a_layer_behind_the_one_that_is_read() -> None:
    assert make_plan(IPCV(layer=4), SPEC).encoder.steady == range(4, 5)
    with pytest.raises(ConfigError, match=r"behind encoder layer 4, whose output is read.*1 to 4"):
        make_plan(IPCV(layer=5), SPEC)
    with pytest.raises(ConfigError, match="encoder layer 6 does not exist"):
        make_plan(IPCV(layer=6), SPEC)


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ((Stage(Site.encoder(2, after_attention=True), HALF, restores=0),), "on entering a layer"),
        ((Stage(Site.encoder(2), HALF, restores=0), Stage(Site.encoder(3), HALF)),
         "has 2 inside the encoder"),
        ((Stage(Site.projector(), None, restores=0),), "only a stage inside an encoder can"),
        ((Stage(Site.encoder(0), HALF, (EncoderChange("own"),)),), "none before it"),
        ((Stage(Site.encoder(2), HALF, (EncoderChange("own"),)),
          Stage(Site.encoder(1, after_attention=True), HALF)), "patches leave inside that one"),
        ((Stage(Site.encoder(2, after_attention=True), HALF, (EncoderChange("own"),)),),
         "Use after_attention=False"),
        ((Stage(Site.encoder(2), HALF, (EncoderFeatures("own"),)),), "or what enters it"),
        ((Stage(Site.projector(), None, (EncoderChange(3),)),), "a layer of its own"),
    ],
)  # fmt: skip
def test_stages_that_do_not_go(stages: tuple[Stage, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_plan(made(*stages), SPEC)


def test_a_selection_that_cannot_bring_back() -> None:
    class Forgets(IPCV):
        """Drops for good where it says it does not."""

        def select(self, tokens: Any, ctx: Any) -> Selection:
            """Without a way back."""
            return Selection.identity(len(tokens.features), tokens.num_tokens)

    model = small.small(small.KINDS["plain"])
    with (
        visprune.prune(model, Forgets()),
        pytest.raises(ConfigError, match=r"brings patches back.*no restoration"),
    ):
        model(small.picture(model))


@pytest.mark.parametrize("steady", [0, 2])
def test_checkpointing_changes_no_gradient_or_is_refused(steady: int) -> None:
    torch.manual_seed(0)
    model, x = alone("clip").train(), torch.randn(2, 3, 24, 24, requires_grad=True)
    params = {"keep_ratio": 0.4, "layer": 1, "attention_stabilization": steady}
    with visprune.prune(model, "ipcv", **params):
        model(pixel_values=x).last_hidden_state.square().sum().backward()
        want = gradients(model)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            loss = model(pixel_values=x).last_hidden_state.square().sum()
            if reentrant:
                with pytest.raises(UnsupportedModel, match="'use_reentrant': False"):
                    loss.backward()
                continue
            loss.backward()
            same(gradients(model), want)
    assert len(want) > 30
