# SPDX-License-Identifier: Apache-2.0
"""The untouched encoder with dropped tokens hidden as keys, or with tokens merged by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from visprune.core.selection import Selection

TOLERANCE = 2e-5


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all())
    scale = max(1.0, float(want.abs().max()))
    assert float((got.double() - want.double()).abs().max()) / scale <= TOLERANCE


def threads_equal_turns(
    model: Any, pictures: list[Tensor], answer: Callable[[Any], Tensor] = lambda output: output
) -> tuple[list[Tensor], Any]:
    """What a pruned model says of each picture, as two threads say it, too; and a copy of it."""
    want, twin = [answer(model(x)) for x in pictures], copy.deepcopy(model)
    with ThreadPoolExecutor(2) as pool:  # each thread has a gradient mode of its own
        got = list(pool.map(torch.no_grad()(model), pictures * 2))
    for one, other in zip(got, want * 2, strict=True):
        assert torch.equal(answer(one), other)
    return want, twin


def alive(run: Any, layer: int) -> Tensor:
    """Patches that are left on entering ``layer`` of the last forward, bool ``[B, N]``."""
    latest = run._reducer.latest
    whole = latest.composed(layer - 1)
    return torch.zeros(latest.batch, latest.total, dtype=torch.bool).scatter(1, whole.index, True)


def hidden_tokens(model: Any, x: Tensor, keep: list[Tensor]) -> Tensor:
    """What the last block gives, when layer n sees only the patches ``keep[n]`` ``[B, N]``."""
    prefix, found = model.num_prefix_tokens, []

    def mask_for(keys: Tensor) -> Callable[..., Any]:
        seen = torch.nn.functional.pad(keys, (prefix, 0), value=True)
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None, None]

        def before(block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attn_mask": bias}

        return before

    with ExitStack() as stack:
        for block, keys in zip(model.blocks, keep, strict=True):
            handle = block.register_forward_pre_hook(mask_for(keys), with_kwargs=True)
            stack.callback(handle.remove)
        last = model.blocks[-1].register_forward_hook(lambda m, a, out: found.append(out))
        stack.callback(last.remove)
        model(x)
    return found[0]


def pooled_over(model: Any, tokens: Tensor, keep: Tensor) -> Tensor:
    """The head on the tokens ``[B, T, D]`` of which only ``keep`` ``[B, N]`` are left."""
    prefix, rows = model.num_prefix_tokens, []
    for own, left in zip(tokens, keep, strict=True):
        there = torch.nn.functional.pad(left, (prefix, 0), value=True)
        rows.append(model.forward_head(model.norm(own[there][None])))
    return torch.cat(rows)


def merged_by_hand(
    model: Any, x: Tensor, choose: Callable[[int, Tensor, Tensor], Selection]
) -> Any:
    """timm's plain blocks written out, with an explicit map between attention and MLP.

    Args:
        model: of ``Block`` blocks, without rotary embeddings.
        x: pixels.
        choose: (layer, keys ``[B, N, d]`` mean over heads, sizes ``[B, N]``) to the map.

    Returns:
        Tokens after the final norm, and the sizes of the patches among them.
    """
    prefix, heads = model.num_prefix_tokens, model.blocks[0].attn.num_heads
    y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    size = torch.ones(len(x), y.shape[1] - prefix)
    for layer, block in enumerate(model.blocks):
        attn, rows = block.attn, block.norm1(y)
        q, k, v = attn.qkv(rows).reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        scores = q @ k.transpose(-2, -1) * attn.scale
        whole = torch.nn.functional.pad(size, (prefix, 0), value=1.0)
        weights = (scores + whole.log()[:, None, None]).softmax(-1)
        out = attn.norm((weights @ v).transpose(1, 2).flatten(2))
        y = y + block.ls1(attn.proj(out))
        chosen = choose(layer, k[:, :, prefix:].mean(1), size)
        matrix = chosen.matrix()
        size = (matrix > 0).float() @ size[..., None]
        y = torch.cat([y[:, :prefix], matrix @ y[:, prefix:]], dim=1)
        y = y + block.ls2(block.mlp(block.norm2(y)))
        size = size[..., 0]
    return model.norm(y), size


def matched_by_hand(keys: Tensor, size: Tensor, r: int, prefix: int) -> Selection:
    """ToMe's rule token by token, for one picture at a time."""
    rows = []
    for key in torch.nn.functional.normalize(keys, dim=-1):
        count = len(key)
        first = [n for n in range(count) if (n + prefix) % 2 == 0]
        second = [n for n in range(count) if (n + prefix) % 2 == 1]
        best = {a: max(second, key=lambda b: float(key[a] @ key[b])) for a in first}
        ranked = sorted(first, key=lambda a: -float(key[a] @ key[best[a]]))
        gone = ranked[:r]
        left = sorted(ranked[r:]) if prefix else ranked[r:]
        order = [*left, *second]
        place = {n: at for at, n in enumerate(order)}
        dest = [place[best[n]] if n in gone else place[n] for n in range(count)]
        rows.append((order, dest))
    index, dest = torch.tensor([o for o, _ in rows]), torch.tensor([d for _, d in rows])
    total = torch.zeros(index.shape).scatter_add(1, dest, size)
    return Selection.assign(index, dest, size / total.gather(1, dest))
