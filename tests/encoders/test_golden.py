# SPDX-License-Identifier: Apache-2.0
"""ToMe and EViT against the stored outputs of their official code; published operation counts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visprune
from visprune.core.method import Context, ModelSpec
from visprune.core.selection import Selection
from visprune.core.signals import EncoderKeys, ReceivedAttention
from visprune.core.signals.base import EncoderSeen
from visprune.core.tokens import VisualTokens

GOLDEN = Path(__file__).parents[1] / "golden"
EVIT = json.loads((GOLDEN / "evit" / "cases.json").read_text())["cases"]
TOME = json.loads((GOLDEN / "tome" / "cases.json").read_text())["cases"]


@pytest.mark.parametrize("case", EVIT, ids=lambda c: c["id"])
@torch.no_grad()
def test_evit(case: dict[str, Any]) -> None:
    stored, p = load_file(GOLDEN / "evit" / case["file"]), case["params"]
    side = round((p["N"] - 1) ** 0.5)
    model = timm.models.VisionTransformer(
        img_size=side, patch_size=1, embed_dim=p["C"], depth=1, num_heads=p["heads"],
        mlp_ratio=p["mlp_hidden"] / p["C"], norm_layer=partial(nn.LayerNorm, eps=p["ln_eps"]),
    ).eval()  # fmt: skip
    weights = {k.removeprefix("w."): v for k, v in stored.items() if k.startswith("w.")}
    model.blocks[0].load_state_dict(weights)
    reduced: list[torch.Tensor] = []
    params = {"keep_ratio": p["keep_rate"], "fuse": p["fuse_token"], "layers": (0,)}
    with visprune.prune(model, "evit", **params) as run:
        model.patch_embed(torch.zeros(p["B"], 3, side, side))
        handle = model.blocks[0].norm2.register_forward_pre_hook(
            lambda module, args: reduced.append(args[0])
        )
        out = model.blocks[0](stored[case["inputs"]["x"]])
        handle.remove()
        kept = torch.stack(run.kept)
    assert torch.equal(kept[:, : p["kept"]], stored["idx"])
    assert bool((kept[:, p["kept"] :] == -1).all())
    torch.testing.assert_close(reduced[0], stored["reduced"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, stored["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", TOME, ids=lambda c: c["id"])
def test_tome(case: dict[str, Any]) -> None:
    stored, p = load_file(GOLDEN / "tome" / case["file"]), case["params"]
    prefix = int(p["class_token"]) + int(p["distill_token"])
    metrics = [
        stored[case["inputs"][k]] for k in ("metric", "metric1", "metric2") if k in case["inputs"]
    ]
    rounds = p["r"] if isinstance(p["r"], list) else [p["r"]]
    x = stored[case["inputs"]["x"]]
    size = stored[case["inputs"]["size"]][..., 0] if "size" in case["inputs"] else None
    size = torch.ones(x.shape[:2]) if size is None else size.float()
    whole = Selection.identity(len(x), x.shape[1])
    for metric, r in zip(metrics, rounds, strict=True):
        count = metric.shape[1] - prefix
        tokens = VisualTokens(x[:, prefix:], size[:, prefix:], torch.zeros(len(x), count, 3))
        ctx = Context(num_keep=count - min(r, count // 2), prefix=prefix,
                      signals={EncoderKeys("own"): metric[:, prefix:]})  # fmt: skip
        made = visprune.get_method("tome", r=r).select(tokens, ctx)
        x = made.reduce(x, prefix)
        size = torch.cat([size[:, :prefix], made.sizes(size[:, prefix:])], dim=1)
        dest, weight = made._by_token()
        first = torch.arange(prefix).expand(len(x), -1)
        dest = torch.cat([first, dest + prefix], dim=1)
        weight = torch.nn.functional.pad(weight, (prefix, 0), value=1.0)
        index = torch.cat([first, made.index + prefix], dim=1)
        step = Selection.assign(index, dest, weight)
        whole = whole.then(step)
    dest = whole.dest()
    assert torch.equal(dest, stored[case["expected"]["source_index"]].long())
    torch.testing.assert_close(x, stored[case["expected"]["out"]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        size[..., None], stored[case["expected"]["size_out"]].float(), rtol=1e-5, atol=1e-6
    )


# GMACs as published or as their papers' formula gives them, with the method's own apart.
ROWS = [
    ("deit_small_patch16_224", "tome", {"r": 13}, 2.703),
    ("deit_tiny_patch16_224", "tome", {"r": 13}, 0.731),
    ("vit_base_patch16_224", "tome", {"r": 13}, 10.367),
    ("vit_base_patch16_224", "tome", {"r": 16}, 8.772),
    ("vit_large_patch16_224", "tome", {"r": 7}, 34.71),
    ("vit_large_patch16_224", "tome", {"r": 8}, 30.96),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.9}, 4.022),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.8}, 3.477),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.7}, 3.029),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.6}, 2.635),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.5}, 2.309),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.9, "fuse": False}, 3.988),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.8, "fuse": False}, 3.444),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.7, "fuse": False}, 2.997),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.6, "fuse": False}, 2.608),
    ("deit_small_patch16_224", "evit", {"keep_ratio": 0.5, "fuse": False}, 2.282),
    ("deit_base_patch16_224", "evit", {"keep_ratio": 0.7}, 11.61),
    ("deit_small_patch16_224", "dynamicvit", {"keep_ratio": 0.7}, 2.878),
    ("deit_base_patch16_224", "dynamicvit", {"keep_ratio": 0.7}, 11.064),
    ("deit_tiny_patch16_224", "tome", {"r": 0}, 1.254),
    ("deit_small_patch16_224", "tome", {"r": 0}, 4.599),
    ("deit_base_patch16_224", "tome", {"r": 0}, 17.564),
]


@pytest.mark.parametrize(("name", "method", "params", "published"), ROWS)
def test_published_operation_counts(
    name: str, method: str, params: dict[str, Any], published: float
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with visprune.prune(model, method, **params) as run:
        giga = run.cost().vision / 1e9
    digits = len(str(published).partition(".")[2])
    assert round(giga, digits) == published


def test_the_predictors_of_dynamicvit_are_counted_apart() -> None:
    with torch.device("meta"):
        small, base = (timm.create_model(f"deit_{n}_patch16_224") for n in ("small", "base"))
    assert round(visprune.prune(small, "dynamicvit", keep_ratio=0.7).cost().macs / 1e9, 3) == 2.981
    assert round(visprune.prune(base, "dynamicvit", keep_ratio=0.7).cost().macs / 1e9, 3) == 11.476


@pytest.mark.parametrize("kind", ["plain", "registers", "siglip", "dinov3", "perception"])
@pytest.mark.parametrize(
    ("method", "params"),
    [("tome", {"r": 3}), ("pitome", {"keep_ratio": 0.7}), ("uniform", {"num_keep": 6})],
)
def test_the_count_is_what_a_counter_counts(kind: str, method: str, params: dict[str, Any]) -> None:
    from tests.encoders import small

    model = small.small(small.KINDS[kind])
    x = small.picture(model)
    # The attention written out: counters do not know the fused one on a CPU.
    parts = [m for m in model.modules() if hasattr(m, "fused_attn")]
    for part in parts:
        part.fused_attn = False
    try:
        # With gradients: without, the counter fails on a view of a parameter.
        with visprune.prune(model, method, **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(x)
            cost = run.cost()
    finally:
        for part in parts:
            part.fused_attn = True
    counted = counter.get_total_flops() / 2
    assert cost.samples == 2
    assert abs(counted - cost.vision) <= cost.selection + 1e-3 * cost.vision
    assert counted >= cost.vision


SPATTEN = json.loads((GOLDEN / "spatten" / "cases.json").read_text())["cases"]


@pytest.mark.parametrize(
    "case", [c for c in SPATTEN if c["params"]["kind"] == "cascade"], ids=lambda c: c["id"]
)
@torch.no_grad()
def test_spatten_cascade(case: dict[str, Any]) -> None:
    """Attention as stored, with the heads that the case prunes; the method chooses the tokens."""
    stored, p = load_file(GOLDEN / "spatten" / case["file"]), case["params"]
    x, protect, width = stored["x"].double(), p["protect"], p["dim"]
    method = visprune.get_method("spatten", keep_ratio=0.5)
    live = torch.arange(p["N"]).expand(p["B"], -1)
    heads = torch.arange(p["num_heads"]).expand(p["B"], -1)
    carried = None
    for layer in range(p["layers"]):
        q, k, v = (
            (x @ stored[f"qkv_{layer}"].double().T)
            .unflatten(-1, (3, p["num_heads"], -1))
            .permute(2, 0, 3, 1, 4)
        )
        at = heads[:, :, None, None].expand(-1, -1, *q.shape[2:])
        scale = q.shape[-1] ** -0.5
        seen = EncoderSeen(protect, False, query=q.gather(1, at), key=k.gather(1, at), scale=scale)
        received = ReceivedAttention("own")
        context = Context(
            num_keep=p["keep_tokens"][layer] - protect,
            signals={received: received.read(seen)},
            prefix=protect,
            carried=carried,
        )
        patches = x[:, protect:]
        tokens = VisualTokens(patches, patches[..., 0] * 0 + 1, torch.empty(0, 0, 3).long())
        chosen = method.select(tokens, context)
        out = torch.zeros_like(v).scatter(
            1, at, (q @ k.transpose(-1, -2) * scale).softmax(-1).gather(
                1, heads[:, :, None, None].expand(-1, -1, q.shape[2], q.shape[2])
            ) @ v.gather(1, at),
        )  # fmt: skip
        x = x + out.transpose(1, 2).flatten(2) @ stored[f"proj_{layer}"].double().T
        x = chosen.reduce(x, protect)
        carried = chosen.carried
        first = live[:, :protect]
        live = torch.cat([first, live[:, protect:].gather(1, chosen.index)], dim=1)
        assert torch.equal(live, stored[f"tokens_{layer}"].long())
        kept = (stored[f"tokens_{layer}"].long(), stored[f"importance_{layer}"])
        before = live_before(stored, layer, p)
        want = kept[1].gather(1, torch.searchsorted(before, live[:, protect:].contiguous()))
        torch.testing.assert_close(carried.float(), want.float(), rtol=1e-4, atol=1e-5)
        heads = stored[f"heads_{layer}"].long()
    assert x.shape[-1] == width
    torch.testing.assert_close(x.float(), stored["out"].float(), rtol=1e-4, atol=1e-4)


def live_before(stored: dict[str, torch.Tensor], layer: int, p: dict[str, Any]) -> torch.Tensor:
    """Places of the tokens that enter a layer."""
    if layer == 0:
        return torch.arange(p["N"]).expand(p["B"], -1).contiguous()
    return stored[f"tokens_{layer - 1}"].long().contiguous()


FLOPS = json.loads((GOLDEN / "flops" / "cases.json").read_text())["cases"]
DIFFRATE = [c for c in FLOPS if c["family"] == "diffrate"]


@pytest.mark.parametrize("case", DIFFRATE, ids=lambda c: c["id"])
def test_diffrate_costs_what_was_published(case: dict[str, Any]) -> None:
    size, _, origin = case["id"].split("_")[1].removeprefix("ViT-").partition("-")
    sizes = {"T": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
    numbers = f"{origin.lower()}_{sizes[size]}-{case['id'].split('_')[2]}"
    shape = case["inputs"]
    with torch.device("meta"):
        model = timm.models.VisionTransformer(
            patch_size=shape["patch"], embed_dim=shape["C"], depth=shape["blocks"],
            num_heads=shape["C"] // 64, num_classes=1000,
        )  # fmt: skip
    with visprune.prune(model, "diffrate", numbers=numbers) as run:
        assert run.cost().vision == case["value"]
        pruned, merged = shape["prune_kept"], shape["merge_kept"]
        counts = run.plan.encoder.counts((224 // shape["patch"]) ** 2, shape["blocks"])
    left = [min(pair) - 1 for pair in zip(pruned, merged, strict=True)]
    assert [after for _, after in counts] == [min(left[: n + 1]) for n in range(len(left))]


@torch.no_grad()
def test_diffrate_by_hand() -> None:
    torch.manual_seed(3)
    count, batch, width = 12, 2, 6
    features, attention = torch.randn(batch, count, width), torch.rand(batch, 3, count)
    method = visprune.get_method("diffrate", pruned=[10], merged=[6], tokens=13)
    stage = method.schedule(ModelSpec("", 0, True, False, encoder_layers=1, encoder_width=width))[0]
    signal = stage.needs[0]
    context = Context(
        num_keep=stage.budget.resolve(count, count), signals={signal: attention}, original=count,
        layer=0, num_layers=1,
    )  # fmt: skip
    tokens = VisualTokens(features, torch.ones(batch, count), torch.empty(0, 0, 3).long())
    chosen = method.select(tokens, context)
    got, sizes = chosen.reduce(features), chosen.sizes(torch.ones(batch, count))
    assert got.shape == (batch, 5, width)
    for row in range(batch):
        ranked = attention[row].mean(0).argsort(descending=True, stable=True).tolist()
        stay, join = ranked[:5], ranked[5:9]
        unit = torch.nn.functional.normalize(features[row], dim=-1)
        groups: dict[int, list[int]] = {n: [n] for n in stay}
        size = dict.fromkeys(stay, 1.0)
        for n in join:
            cosines = [float(unit[n] @ unit[m]) for m in stay]
            best = max(range(5), key=lambda m: cosines[m])
            groups[stay[best]].append(n)
            size[stay[best]] += max(cosines[best], 0.0)
        want = torch.stack([features[row, groups[n]].mean(0) for n in stay])
        torch.testing.assert_close(got[row], want)
        torch.testing.assert_close(sizes[row], torch.tensor([size[n] for n in stay]))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"numbers": "deit_smal-2.9"}, "Did you mean 'deit_small-2.9'"),
        ({"pruned": [4, 3]}, "two lists"),
        ({"pruned": [4, 3], "merged": [4]}, "two lists"),
        ({"pruned": [4, 1], "merged": [4, 2]}, "from 2"),
        ({"pruned": [4, 3], "merged": [4, 2], "numbers": "deit_small-2.9"}, "without numbers"),
        ({"numbers": "mae_large-38.5"}, "for 24 layers.* has 12"),
    ],
)
def test_diffrate_refuses(params: dict[str, Any], match: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    with pytest.raises(visprune.VispruneError, match=match):
        visprune.prune(model, "diffrate", **params)
