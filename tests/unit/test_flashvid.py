# SPDX-License-Identifier: Apache-2.0
"""FlashVID: trees through time against the rule written out, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import visprune
from visprune.core import Context, VisualTokens
from visprune.core.signals import Frames
from visprune.errors import ConfigError
from visprune.methods.flashvid import FlashVID, tell_apart

T, N, D = 6, 9, 16


def clip(x: Tensor) -> VisualTokens:
    """Clips ``[B, T, n, D]``."""
    batch, frames, each, _ = x.shape
    steps = torch.arange(frames * each)
    pos = torch.stack([steps // each, steps % each // 3, steps % 3], dim=1)
    features = x.flatten(1, 2)
    return VisualTokens(
        features, torch.ones(features.shape[:2]), pos.expand(batch, -1, -1), "video"
    )


def chosen(method: FlashVID, tokens: VisualTokens, keep: int) -> visprune.core.Selection:
    return method.select(tokens, Context(num_keep=keep, signals={Frames(): Frames().read(tokens)}))


def moving(seed: int = 0) -> Tensor:
    """Tokens that drift from frame to frame, some fast, and change altogether in frame 3."""
    draw = torch.Generator().manual_seed(seed)
    now, frames = torch.randn(N, D, generator=draw), []
    for frame in range(T):
        if frame == 3:
            now = torch.randn(N, D, generator=draw)
        frames.append(now)
        speed = torch.linspace(0.05, 1.0, N)[:, None]
        now = now + speed * torch.randn(N, D, generator=draw)
    return torch.stack(frames)


def test_a_still_clip_becomes_one_frame() -> None:
    x = moving()[:1].expand(T, -1, -1)
    x = x + 1e-4 * torch.randn(T, N, D, generator=torch.Generator().manual_seed(1))
    made = chosen(FlashVID(num_keep=N, alpha=0.0, segments=1), clip(x[None]), N)
    assert made.index.tolist() == [list(range(N))]  # a tree stands at its first frame
    torch.testing.assert_close(made.reduce(x.flatten(0, 1)[None])[0], x.mean(0))


def test_nothing_is_joined_across_a_cut() -> None:
    half = moving()[:1].expand(3, -1, -1)
    x = torch.cat([half, half])  # the same scene twice: every token has its like
    two = FlashVID(num_keep=2 * N, alpha=0.0, segments=1).trees(x, torch.ones(T, N).bool(), 0)
    assert two.unique().tolist() == list(range(N))
    cut = x.clone()
    cut[3:] += 4.0  # another mean, and cosines of tokens that are still above the threshold
    method = FlashVID(num_keep=2 * N, alpha=0.0, segments=1, link=0.0)
    assert method.cuts(cut).tolist() == [False, False, True, False, False]
    assert method.trees(cut, torch.ones(T, N).bool(), 0).unique().tolist() == [
        *range(N), *range(3 * N, 4 * N),
    ]  # fmt: skip
    assert FlashVID(num_keep=1, segments=3).cuts(x).sum() == 2  # at least three spans


@pytest.mark.parametrize("enough", [0, 20, 40, 54])
def test_trees_are_those_of_the_rule_written_out(enough: int) -> None:
    x = moving()
    free = torch.rand(T, N, generator=torch.Generator().manual_seed(2)) > 0.2
    method = FlashVID(num_keep=9, segments=2, link=0.6)
    found, cuts = method.trees(x, free, enough), method.cuts(x).tolist()
    unit = torch.nn.functional.normalize(x, dim=-1)
    links = []
    for t in range(1, T):
        for p in range(N):
            others = [q for q in range(N) if free[t - 1, q]]
            if not free[t, p] or cuts[t - 1] or not others:
                continue
            cosine, q = max((float(unit[t, p] @ unit[t - 1, q]), -q) for q in others)
            if cosine > 0.6:
                links.append((-cosine, t * N + p, (t - 1) * N - q))
    parent = {child: above for _, child, above in sorted(links)[: max(0, int(free.sum()) - enough)]}
    assert len(parent) > 3 or enough == 54
    for token in range(T * N):
        root = token
        while root in parent:
            root = parent[root]
        assert int(found[token]) == root


def test_selected_tokens_stay_themselves_and_all_others_are_means() -> None:
    x = torch.stack([moving(), moving(5)])
    made = chosen(FlashVID(num_keep=12, alpha=0.5, segments=2, link=0.6), clip(x), 12)
    matrix = made.matrix()
    assert torch.allclose(matrix.sum(2), torch.ones(2, 12), atol=1e-5)
    for b in range(2):
        mask = tell_apart(x[b], torch.ones(T, N), 1).flatten()
        alone = matrix[b][:, mask]
        assert torch.equal(alone.sum(1) > 0, alone.sum(1) == 1)  # each has a slot to itself
        assert int((alone > 0).sum()) == T
        assert made.index[b].tolist() == sorted(made.index[b].tolist())
    assert bool((matrix.gt(0).sum(1) <= 1).all())  # no token comes to two slots


def test_selection_keeps_tokens_apart() -> None:
    x = moving()
    x[:, 1] = x[:, 0] * 2  # the same direction twice
    for number in (1, 4, N):
        mask = tell_apart(x, torch.ones(T, N), number)
        assert mask.sum(1).tolist() == [number] * T
    assert not bool((tell_apart(x.abs(), torch.ones(T, N), 4)[:, :2].all(1)).any())
    seen = torch.full((T, N), 1e-3)
    seen[:, 5] = 1.0
    assert bool(tell_apart(x.abs(), seen, 1)[:, 5].all())  # what is attended to is told apart


@pytest.mark.parametrize("seed", range(4))
def test_selection_is_the_rule_written_out(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 300, D, generator=draw)
    x[:, 7] = x[:, 3]  # two that are alike
    seen = torch.rand(2, 300, generator=draw)
    number = 40
    found = tell_apart(x if seed % 2 else x.abs(), seen, number)  # products of both signs, or one
    x = (x if seed % 2 else x.abs()).double()
    unit = torch.nn.functional.normalize(x, dim=-1)
    means = x.mean(1)
    for frame in range(2):
        weight = seen[frame].double() * (x[frame] @ means.T).mean(1)
        distance = (1.0 - unit[frame] @ unit[frame].T) * weight  # to a token, by its own weight
        near = distance.sort(dim=0).values[1]
        order: list[int] = []
        while len(order) < number:
            best = max((float(near[n]), -n) for n in range(300) if n not in order)
            order.append(-best[1])
            row = distance[order[-1]]
            near = row if len(order) == 1 else torch.minimum(near, row)
        assert found[frame].nonzero()[:, 0].tolist() == sorted(order)


def test_frames_that_were_thinned_out_are_refused() -> None:
    tokens = clip(moving()[None])
    index = torch.arange(1, T * N)
    thin = VisualTokens(
        tokens.features[:, index], tokens.size[:, index], tokens.pos[:, index], "video"
    )
    with pytest.raises(ConfigError, match="joins whole frames; in a chain it comes first"):
        chosen(FlashVID(num_keep=9), thin, 9)
    with pytest.raises(ConfigError, match=r"alpha is a share of the budget, in \[0, 1\]; got 1.5"):
        FlashVID(num_keep=9, alpha=1.5)
