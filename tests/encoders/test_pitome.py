# SPDX-License-Identifier: Apache-2.0
"""PiToMe against its rule written out token by token in double precision.

No output of the official code is at hand. The rule is that of arXiv:2405.16148 and of the code at
hchautran/PiToMe 550b5de: the energy of section 3.2, pairs in energy order, the first half of the
layers as in ToMe, the other half between the tokens of high energy alone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import visprune
from tests.encoders import small
from visprune.core.method import Context
from visprune.core.signals import EncoderKeys
from visprune.core.tokens import VisualTokens

LAYERS = 6


def merged(
    keys: torch.Tensor, x: torch.Tensor, size: torch.Tensor, ratio: float, layer: int
) -> dict[frozenset[int], list[float]]:
    """Groups of tokens that become one, and their mean; one picture, ``[N, D]``, fp64 loops."""
    n = len(keys)
    r = math.floor(n - n * ratio)
    norm = [math.sqrt(float((k * k).sum())) for k in keys]
    cos = [[float(keys[i] @ keys[j]) / (norm[i] * norm[j]) for j in range(n)] for i in range(n)]
    margin = 0.75 - 0.75 * layer / LAYERS

    def elu(value: float) -> float:
        return value if value > 0 else math.exp(value) - 1

    energy = [sum(elu(cos[i][j] - margin) for j in range(n)) / n for i in range(n)]
    order = sorted(range(n), key=lambda i: (-energy[i], i))
    if layer < math.ceil(LAYERS / 2):
        giving, taking = order[0::2], order[1::2]
    else:
        giving, taking = order[0 : 2 * r : 2], order[1 : 2 * r : 2]
    best = {a: max(taking, key=lambda b: (cos[a][b], -taking.index(b))) for a in giving}
    going = sorted(giving, key=lambda a: -cos[a][best[a]])[:r]
    groups: dict[int, list[int]] = {i: [i] for i in range(n) if i not in going}
    for a in going:
        groups[best[a]].append(a)
    result = {}
    for members in groups.values():
        weight = sum(float(size[i]) for i in members)
        mean = sum(x[i] * float(size[i]) for i in members) / weight
        result[frozenset(members)] = mean.tolist()  # type: ignore[union-attr]
    return result


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("count", "ratio"), [(20, 0.7), (17, 0.9), (12, 0.5), (9, 0.8)])
def test_the_rule_token_by_token(layer: int, count: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(layer * 100 + count)
    keys = torch.randn(3, count, 8, generator=generator)
    keys[:, : count // 2] += 1.5  # a uniform region, so that energies differ
    x = torch.randn(3, count, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (3, count), generator=generator).float()
    method = visprune.get_method("pitome", keep_ratio=ratio)
    keep = count - math.floor(count - count * ratio)
    ctx = Context(num_keep=keep, signals={EncoderKeys("own"): keys}, layer=layer, num_layers=LAYERS)
    selection = method.select(VisualTokens(x, size, torch.zeros(3, count, 3)), ctx)
    assert selection.num_slots == keep
    got, dest = selection.reduce(x), selection.dest()
    for row in range(3):
        want = merged(keys[row].double(), x[row], size[row], ratio, layer)
        groups = [frozenset((dest[row] == slot).nonzero()[:, 0].tolist()) for slot in range(keep)]
        assert {*groups} == {*want}
        for slot, members in enumerate(groups):
            expected = torch.tensor(want[members], dtype=torch.float64)
            torch.testing.assert_close(got[row, slot], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("given", [{}, {"prop_attn": True}])
def test_attention_knows_sizes_only_on_request(given: dict[str, bool]) -> None:
    """The official ViT: plain attention over the merged tokens, block by block."""
    model = small.small(small.KINDS["plain"], 2)
    x, biases = small.picture(model), []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        biases.append(kwargs.get("attn_mask"))

    with visprune.prune(model, "pitome", keep_ratio=0.7, **given) as run, torch.no_grad():
        for block in model.blocks:
            block.attn.register_forward_pre_hook(watch, with_kwargs=True)
        model(x)
        assert run.trace.mlp_tokens_per_layer[0][0] < 24
    assert all(bias is None for bias in biases) == (not given)


@pytest.mark.parametrize("ratio", [0.925, 0.8])
def test_the_tokens_of_every_layer_follow_the_ratio(ratio: float) -> None:
    import timm

    model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    with visprune.prune(model, "pitome", keep_ratio=ratio) as run, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    left = 196
    for inside in run.trace.mlp_tokens_per_layer[0]:
        left -= math.floor(left - left * ratio)
        assert inside == left
