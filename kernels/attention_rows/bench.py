# SPDX-License-Identifier: Apache-2.0
"""Time ``attention_rows`` and ``column_sums`` beside attention maps written out in full.

``python -m visprune.kernels.attention_rows.bench``: the results must agree first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from visprune.kernels.common import options, results, timing

from . import cases, op, reference

Row = dict[str, object]


def _pairs(
    q: Tensor, k: Tensor, scale: float, backend: str
) -> dict[str, tuple[Callable[[], Tensor], ...]]:
    """Name -> (baseline, ours). Columns take all rows: ``q`` repeated to the length of ``k``."""
    n = k.shape[2]
    wave = torch.arange(n, device=q.device).view(1, 1, n, 1).sin()
    every = q[:, :, :1].expand(-1, -1, n, -1) + (0.1 * wave).to(q.dtype)
    rows = (q, k, scale, None, None, "mean", 0.0)
    columns = (every, k, scale, None, True, None, "mean")
    return {
        "rows, mean": (
            lambda: reference.attention_rows(*rows),
            lambda: op.attention_rows(*rows, backend),
        ),
        "column sums, causal": (
            lambda: reference.column_sums(*columns),
            lambda: op.column_sums(*columns, 128, 0.0, backend),
        ),
    }


def run(
    rounds: int = 5,
    threads: int = 2,
    shapes: Iterable[tuple[str, int, int, int, int, int]] = cases.BENCH_SHAPES,
    clock: str = "wall",
    columns_up_to: int = 640,
    device: str = "cpu",
) -> list[Row]:
    """One row per shape and operator; times are missing where the results disagree.

    ``columns_up_to``: the full maps of the column baseline need H * N * N floats, so longer
    sequences are timed for rows only.
    """
    out: list[Row] = []
    backend = "triton" if device == "cuda" else "torch"
    with timing.threads(threads), torch.inference_mode():
        for name, heads, kv, rows, n, dim in shapes:
            gen = torch.Generator().manual_seed(0)
            q = torch.randn(1, heads, rows, dim, generator=gen).to(device)
            k = torch.randn(1, kv, n, dim, generator=gen).to(device)
            for label, (base, ours) in _pairs(q, k, dim**-0.5, backend).items():
                if "column" in label and n > columns_up_to:
                    continue
                shown = n if "column" in label else rows
                row: Row = {"case": name, "H/Hkv": f"{heads}/{kv}", "R": shown, "N": n}
                row["operator"] = label
                row["agree"] = torch.allclose(base(), ours(), rtol=1e-4, atol=1e-5)
                if row["agree"]:
                    calls = {"baseline": base, "ours": ours}
                    times = timing.interleaved(calls, rounds, clock=clock)
                    result = timing.summary(times, "baseline")
                    row["baseline ms"] = result["baseline"]["ms"]
                    row["ms"], row["ratio"] = result["ours"]["ms"], result["ours"]["ratio"]
                else:
                    row |= {"baseline ms": "-", "ms": "-", "ratio": "-"}
                out.append(row)
    return out


def main() -> int:
    """Print the table; exit 1 if any result disagrees."""
    args = options.read(options.parser(__doc__, rounds=5))
    rows = run(args.rounds, args.threads, clock=args.clock, device=args.device)
    about = results.machine(args.device, args.threads)
    results.show(rows, {**about, "rounds": args.rounds, "clock": args.clock}, args.csv)
    return int(not all(row["agree"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
