# SPDX-License-Identifier: Apache-2.0
"""FiCoCo-V against the official output, and against its rule written out patch by patch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import visprune
from tests.encoders import oracle, small
from visprune.core.method import Context
from visprune.core.signals import EncoderLogits
from visprune.core.signals.base import EncoderSeen
from visprune.core.tokens import VisualTokens
from visprune.errors import BudgetError, ConfigError
from visprune.methods.ficoco_v import correlated, scores, takers, windows

GOLDEN = Path(__file__).parents[1] / "golden" / "ficoco_v"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]


def grid(height: int, width: int) -> torch.Tensor:
    """Places of the patches of one picture, ``[1, N, 3]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(1, -1, 3)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_the_official_output(case: dict[str, Any]) -> None:
    """Order, targets and weights are the method's; the test puts the code's two defects on top."""
    stored, p = load_file(GOLDEN / case["file"]), case["params"]
    seen = EncoderSeen(
        1, True, query=stored["q"][None], key=stored["k"][None], scale=p["head_dim"] ** -0.5
    )
    logits = EncoderLogits("own").read(seen)
    score = scores(logits, windows(grid(24, 24)), p["beta"])
    order = torch.cat([score.argsort(dim=1, stable=True)[0] + 1, torch.zeros(1, dtype=torch.int64)])
    assert torch.equal(order, stored["order"])
    merged, left = order[: p["r"]], order[p["r"] :]
    assert takers(577) == stored["targets"].shape[1]
    targets, weight = correlated(logits[:, merged], takers(577))
    assert torch.equal(targets[0], stored["targets"])
    # Places in the picture, applied to the list of those left in order of score.
    place = torch.where(targets >= len(left), targets - p["r"], targets).flatten()
    came = stored["x"][0, merged][:, None] * weight[0, ..., None]
    size = torch.ones(len(left)).index_add(0, place, weight.flatten())
    out = stored["x"][0, left].index_add(0, place, came.flatten(0, 1)) / size[:, None]
    torch.testing.assert_close(size, stored["size"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, stored["out"], rtol=1e-4, atol=1e-5)


def by_hand(
    logits: torch.Tensor, x: torch.Tensor, place: list[tuple[int, int]], r: int, beta: float
) -> tuple[list[int], torch.Tensor]:
    """The patches that stay and their features; one picture, loops in double precision."""
    n = len(x)
    rows = [[float(logits[i, j]) for j in range(n + 1)] for i in range(n + 1)]
    asked = rows[0][1:]
    alike = [sum(rows[i + 1][1:]) / n for i in range(n)]
    a, b = (math.sqrt(sum(v * v for v in values)) for values in (asked, alike))
    score = [beta * asked[i] / a - (1 - beta) * alike[i] / b for i in range(n)]
    smallest: dict[tuple[int, int], int] = {}
    for i in range(n):
        key = (place[i][0] // 2, place[i][1] // 2)
        if key not in smallest or score[i] < score[smallest[key]]:
            smallest[key] = i
    for i in smallest.values():
        score[i] = score[i] / 2 if score[i] > 0 else score[i] * 2
    order = sorted(range(n), key=lambda i: (score[i], i))
    going, stay = order[:r], sorted(order[r:])
    want = {i: x[i].clone() for i in stay}
    size = dict.fromkeys(stay, 1.0)
    many = min(max(1, n - int(0.998 * n)), len(stay))
    for i in going:
        best = sorted(stay, key=lambda j: -rows[i + 1][j + 1])[:many]
        total = sum(math.exp(rows[i + 1][j + 1]) for j in best)
        for j in best:
            share = math.exp(rows[i + 1][j + 1]) / total
            want[j] += share * x[i]
            size[j] += share
    return stay, torch.stack([want[j] / size[j] for j in stay])


@pytest.mark.parametrize(
    ("height", "width", "r"), [(4, 6, 5), (5, 5, 12), (1, 7, 2), (24, 24, 42), (24, 22, 100)]
)
def test_the_rule_patch_by_patch(height: int, width: int, r: int) -> None:
    generator, n = torch.Generator().manual_seed(height * width), height * width
    logits = torch.randn(2, n + 1, n + 1, generator=generator)
    x = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    # A later stage: some places are gone, and the windows come with the patches.
    pos = grid(height + 2, width)[:, torch.randperm((height + 2) * width, generator=generator)[:n]]
    window = windows(pos).expand(2, -1)
    ctx = Context(num_keep=n - r, signals={EncoderLogits("own"): logits}, carried=window)
    method = visprune.get_method("ficoco_v", r=r)
    chosen = method.select(VisualTokens(x, torch.ones(2, n), torch.empty(0, 0, 3)), ctx)
    got = chosen.reduce(x)
    assert torch.equal(chosen.carried, window.gather(1, chosen.index))
    for row in range(2):
        stay, want = by_hand(logits[row], x[row], pos[0, :, 1:].tolist(), r, 0.35)
        assert chosen.index[row].tolist() == stay
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-6)
    sizes = chosen.sizes(torch.ones(2, n))
    torch.testing.assert_close(sizes.sum(1), torch.full((2,), float(n)))


def test_logits_are_the_mean_over_heads_without_registers() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 3, generator=generator)
    key = torch.randn(2, 2, 9, 3, generator=generator)
    shown = EncoderLogits("own").read(EncoderSeen(3, True, query=query, key=key, scale=0.5))
    whole = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)).mean(1) * 0.5
    there = [0, 3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(shown, whole[:, there][:, :, there])


@pytest.mark.parametrize("kind", ["plain", "registers", "layer_scale"])
@torch.no_grad()
def test_a_model_under_it(kind: str) -> None:
    """Only later layers merge, pictures are alone as in the batch, and the class token stays."""
    model = small.small(small.KINDS[kind])
    x = small.picture(model)
    before = model(x)
    with visprune.prune(model, "ficoco_v", r=3) as run:
        got = model(x)
        counts = run.trace.mlp_tokens_per_layer[0]
        sizes = torch.stack(run.trace.sizes)
        alone = torch.cat([model(x[:1]), model(x[1:])])
    oracle.assert_close(got, alone)
    total, layers = int(sizes.sum(1)[0].round()), len(model.blocks)
    behind = layers - math.ceil(layers / 2)
    assert counts == [total] * (layers - behind) + [total - 3 * n for n in range(1, behind + 1)]
    with visprune.prune(model, "ficoco_v", r=0):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("params", "kind", "match"),
    [
        ({"r": -1}, BudgetError, "at least 0; got -1"),
        ({"r": 1.5}, (BudgetError, ConfigError), "1.5"),
        ({"beta": 1.2}, ConfigError, r"in \[0, 1\]; got 1.2"),
        ({"front": 1.0}, ConfigError, r"in \[0, 1\); got 1.0"),
    ],
)
def test_refused(params: dict[str, Any], kind: Any, match: str) -> None:
    with pytest.raises(kind, match=match):
        visprune.get_method("ficoco_v", **params)
