# SPDX-License-Identifier: Apache-2.0
"""Time decoding over ragged caches beside PyTorch's attention over dense ones.

``python -m visprune.kernels.ragged_decode.bench``: the results must agree first. Ten percent of
the slots are kept, every head its own number of them. ``MB``: the bytes of keys and values (codes,
scales) that one call has to read, the floor of any implementation. Every call of a turn reads
another layer's cache, as a decode step does, so that they come from memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visprune.kernels.common import options, results, timing

from . import cases, op, quantize

Row = dict[str, object]
Layer = Callable[[Tensor], Tensor]  # q [1, H, 1, d] -> the same
KEPT = 0.1
MAX_BYTES = 400e6  # of the dense caches of all layers
GROUP = 32


def budgets(slots: int, heads: int, gen: torch.Generator) -> list[int]:
    """A number of slots for every head, between a quarter and seven times that; sum as asked."""
    share = torch.rand(heads, generator=gen) * 1.5 + 0.25
    counts = (share / share.sum() * slots * heads).int().tolist()
    counts[0] += slots * heads - sum(counts)
    return [int(c) for c in counts]


def _dense(k: Tensor, v: Tensor, heads: int) -> Layer:
    gqa = heads != k.shape[1]
    return lambda q: scaled_dot_product_attention(q, k, v, enable_gqa=gqa)


def _stored(k: Tensor, counts: list[int], offsets: Tensor) -> Tensor:
    """The first ``counts`` slots of every head of [1, Hkv, N, d]; zeros in the room between."""
    out = k.new_zeros(int(offsets[-1]), k.shape[-1])
    for head, (count, first) in enumerate(zip(counts, offsets.tolist(), strict=False)):
        out[first : first + count] = k[0, head, :count]
    return out


def _codes(codes: tuple[Tensor, ...], pairs: tuple[Any, ...], rest: tuple[Any, ...]) -> Layer:
    def call(q: Tensor) -> Tensor:
        out: Tensor = op.ragged_decode_quantized(q, *codes, *pairs, *rest)[0]
        return out

    return call


def _layer(
    k: Tensor, v: Tensor, heads: int, counts: list[int], offsets: Tensor, backend: str
) -> dict[str, tuple[Layer, int]]:
    """Name -> (decode of this layer, bytes that it reads)."""
    kv, dim, width = k.shape[1], k.shape[3], k.element_size()
    equal = sum(counts) // kv
    lengths, device = torch.tensor(counts), k.device
    keys, values = (_stored(x, counts, offsets) for x in (k, v))
    places, rest = offsets.to(device), (dim**-0.5, None, False, 0.0, False, backend)
    used = lengths.to(device)
    share = k[:, :, :equal].contiguous(), v[:, :, :equal].contiguous()
    found: dict[str, tuple[Layer, int]] = {
        "dense": (_dense(k, v, heads), 2 * k.numel() * width),
        "dense, as many slots": (_dense(*share, heads), 2 * share[0].numel() * width),
        "10 % per head": (
            lambda q: op.ragged_decode(q, keys, values, places, used, *rest)[0],
            2 * sum(counts) * dim * width,
        ),
    }
    for bits in (4, 2):
        codes = (
            *quantize.quantize(keys, bits, GROUP, True, None),
            *quantize.quantize(values, bits, GROUP, False, None),
        )
        pairs = ((bits, bits), (GROUP, GROUP), (True, False))
        size = sum(t.numel() * t.element_size() for t in codes) * sum(counts) // len(keys)

        found[f"10 % per head, {bits} bit"] = (_codes(codes, pairs, (places, used, *rest)), size)
    return found


def _agree(
    found: dict[str, tuple[Layer, int]], q: Tensor, k: Tensor, v: Tensor, counts: list[int]
) -> dict[str, bool]:
    """Our storages against plain attention over each head's own slots; codes within their step."""
    group = q.shape[1] // k.shape[1]
    parts = [
        scaled_dot_product_attention(
            q[:, g * group : (g + 1) * group],
            k[:, g : g + 1, :n].expand(-1, group, -1, -1),
            v[:, g : g + 1, :n].expand(-1, group, -1, -1),
        )
        for g, n in enumerate(counts)
    ]
    want = torch.cat(parts, 1).float()
    close = {}
    for name, (call, _) in found.items():
        if name.startswith("dense"):
            close[name] = True
            continue
        error = (call(q).float() - want).abs().max() / want.abs().max()
        most = {"4 bit": 0.3, "2 bit": 1.5}.get(
            name[-5:], 1e-5 if q.dtype == torch.float32 else 0.02
        )
        close[name] = bool(error < most)
    return close


def run(
    rounds: int = 7,
    threads: int = 2,
    shapes: Iterable[tuple[str, int, int, int, int]] = cases.BENCH_SHAPES,
    clock: str = "wall",
    device: str = "cpu",
    layers: int = 16,
) -> list[Row]:
    """One row for each shape and storage; times are missing where the results disagree."""
    out: list[Row] = []
    backend, dtype = ("triton", torch.bfloat16) if device == "cuda" else ("torch", torch.float32)
    with timing.threads(threads), torch.inference_mode():
        for name, slots, heads, kv, dim in shapes:
            gen = torch.Generator().manual_seed(0)
            counts = budgets(max(1, int(slots * KEPT)), kv, gen)
            ends = (torch.tensor(counts) + op.BLOCK - 1) // op.BLOCK * op.BLOCK
            offsets = torch.nn.functional.pad(ends.cumsum(0), (1, 0))
            count = max(1, min(layers, int(MAX_BYTES / (2 * kv * slots * dim * dtype.itemsize))))
            q = torch.randn(1, heads, 1, dim, generator=gen).to(device, dtype)
            caches = [
                torch.randn(2, 1, kv, slots, dim, generator=gen).to(device, dtype)
                for _ in range(count)
            ]
            stack = [_layer(pair[0], pair[1], heads, counts, offsets, backend) for pair in caches]
            agree = _agree(stack[0], q, caches[0][0], caches[0][1], counts)
            calls = {
                key: lambda key=key, stack=stack, q=q: [layer[key][0](q) for layer in stack]
                for key in stack[0]
            }
            calls = {key: call for key, call in calls.items() if agree[key]}
            times = timing.interleaved(calls, rounds, clock=clock)
            full = timing.summary(times, "dense")
            same = timing.summary(times, "dense, as many slots")
            for key, (_, size) in stack[0].items():
                row: Row = {"case": name, "N": slots, "H/Hkv": f"{heads}/{kv}", "storage": key}
                row |= {"MB": size / 1e6, "agree": agree[key]}
                row |= {"ms": "-", "GB/s": "-", "x dense": "-", "x as many slots": "-"}
                if agree[key]:
                    ms = full[key]["ms"] / count
                    row |= {"ms": ms, "GB/s": size / ms / 1e6, "x dense": full[key]["ratio"]}
                    row["x as many slots"] = same[key]["ratio"]
                out.append(row)
    return out


def main() -> int:
    """Print the table; exit 1 if any result disagrees."""
    args = options.read(options.parser(__doc__, rounds=7))
    rows = run(args.rounds, args.threads, clock=args.clock, device=args.device)
    about = results.machine(args.device, args.threads)
    results.show(rows, {**about, "rounds": args.rounds, "clock": args.clock}, args.csv)
    return int(not all(row["agree"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
