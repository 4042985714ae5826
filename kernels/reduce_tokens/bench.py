# SPDX-License-Identifier: Apache-2.0
"""Time gather and weighted merge beside the same map as an explicit matrix product.

``python -m visprune.kernels.reduce_tokens.bench``: the results must agree first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from visprune.kernels.common import options, results, timing

from . import cases, op

Row = dict[str, object]
Entries = tuple[Tensor | None, Tensor | None, Tensor | None]


def _by_matrix(x: Tensor, entries: Entries, slots: int) -> Tensor:
    """Write the [B, slots, N] matrix and multiply."""
    source, slot, weight = entries
    batch, n, _ = x.shape
    matrix = x.new_zeros(batch, slots, n)
    b = torch.arange(batch, device=x.device)[:, None]
    token = torch.arange(n, device=x.device)[None] if source is None else source
    target = torch.arange(slots, device=x.device)[None] if slot is None else slot
    matrix[b, target, token] = 1.0 if weight is None else weight
    return matrix @ x


def run(
    rounds: int = 7,
    threads: int = 2,
    shapes: Iterable[tuple[str, int, int, int, int]] = cases.BENCH_SHAPES,
    clock: str = "wall",
    device: str = "cpu",
) -> list[Row]:
    """One row per shape and kind of map; times are missing where the results disagree."""
    out: list[Row] = []
    backend = "triton" if device == "cuda" else "torch"
    with timing.threads(threads), torch.inference_mode():
        for name, batch, n, slots, dim in shapes:
            gen = torch.Generator().manual_seed(0)
            x = torch.randn(batch, n, dim, generator=gen)
            keep = torch.stack([torch.randperm(n, generator=gen)[:slots] for _ in range(batch)])
            dest = torch.randint(0, slots, (batch, n), generator=gen)
            weight = torch.rand(batch, n, generator=gen)
            x, keep, dest, weight = (t.to(device) for t in (x, keep, dest, weight))
            kinds: dict[str, Entries] = {
                "gather": (keep, None, None),
                "weighted merge": (None, dest, weight),
            }
            for label, entries in kinds.items():
                calls = {
                    "baseline": lambda e=entries, x=x, s=slots: _by_matrix(x, e, s),
                    "ours": lambda e=entries, x=x, s=slots: op.reduce_tokens(x, *e, s, backend),
                }
                row: Row = {"case": name, "B": batch, "N": n, "K": slots, "D": dim, "map": label}
                got, want = calls["ours"](), calls["baseline"]()
                row["agree"] = torch.allclose(got, want, rtol=1e-4, atol=1e-4)
                row |= {"baseline ms": "-", "ms": "-", "ratio": "-"}
                if row["agree"]:
                    times = timing.interleaved(calls, rounds, clock=clock)
                    result = timing.summary(times, "baseline")
                    row["baseline ms"] = result["baseline"]["ms"]
                    row["ms"], row["ratio"] = result["ours"]["ms"], result["ours"]["ratio"]
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
