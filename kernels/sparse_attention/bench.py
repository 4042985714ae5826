# SPDX-License-Identifier: Apache-2.0
"""Time sparse attention beside PyTorch's dense attention, and find where it overtakes.

``visprune bench sparse_attention``: every pair of tokens N and keys K by index, a block mask at
high resolution, and the low-rank top-k beside scores written in full. The results must agree with
the reference first; then medians of interleaved rounds. ``--csv FILE`` adds the rows with device,
versions, date and command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from visprune.kernels.common import options, results, timing

from . import cases, op, reference

Row = dict[str, object]
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS, DIM = 6, 64
RANK = 32  # the predictor's


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the sparse result is compared with in speed: every key."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _timed(call: Call, tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
    if not backward:
        return lambda: call(*tensors)
    return lambda: torch.autograd.grad(call(*tensors).sum(), tensors)


def _measure(
    head: Row, ours: Call, truth: Call, tensors: tuple[Tensor, ...], rounds: int, clock: str
) -> Row:
    """Correctness on a few queries of one head (the reference is N x N), then both directions."""
    row = dict(head)
    with torch.no_grad():
        row["agree"] = torch.allclose(truth(*tensors), ours(*tensors), 1e-3, 1e-4)
    for label, backward in (("forward", False), ("with backward", True)):
        if not row["agree"]:
            row |= {f"dense {label} ms": "-", f"{label} ms": "-", f"{label} ratio": "-"}
            continue
        with torch.enable_grad() if backward else torch.no_grad():
            calls = {
                "dense": _timed(dense, tensors, backward),
                "ours": _timed(ours, tensors, backward),
            }
            found = timing.summary(timing.interleaved(calls, rounds, clock=clock), "dense")
        row[f"dense {label} ms"], row[f"{label} ms"] = found["dense"]["ms"], found["ours"]["ms"]
        row[f"{label} ratio"] = found["ours"]["ratio"]
    return row


def _inputs(n: int, batch: int, device: str) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    shape = (3, batch, HEADS, n, DIM)
    q, k, v = torch.randn(shape, generator=gen).to(device).unbind(0)
    return tuple(t.clone().requires_grad_() for t in (q, k, v))


def run_index(
    tokens: Iterable[int], keys: Iterable[int], rounds: int, device: str, clock: str, batch: int = 1
) -> list[Row]:
    """One row per N and K: random different keys of every query, the hard case for a cache."""
    backend = "triton" if device == "cuda" else "torch"
    rows = []
    for n in tokens:
        tensors = _inputs(n, batch, device)
        few = max(3, rounds if n < 1000 else rounds // 3)
        for width in (w for w in keys if w < n):
            gen = torch.Generator().manual_seed(1)
            idx = cases.some_keys((batch, HEADS, n), n, width, gen).to(device)

            def ours(q: Tensor, k: Tensor, v: Tensor, idx: Tensor = idx) -> Tensor:
                return op.sparse_attention(q, k, v, idx, DIM**-0.5, backend)

            def truth(q: Tensor, k: Tensor, v: Tensor, idx: Tensor = idx) -> Tensor:
                mask = torch.zeros(*idx.shape[:3], k.shape[2], dtype=torch.bool, device=device)
                mask.scatter_(3, idx, torch.ones_like(idx, dtype=torch.bool))
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

            head: Row = {"keys by": "index", "N": n, "K": width, "K / N": round(width / n, 4)}
            rows.append(_measure(head, ours, truth, tensors, few, clock))
    return rows


def run_blocks(
    tokens: Iterable[int], shares: Iterable[float], rounds: int, device: str, clock: str
) -> list[Row]:
    """One row per N and share of 64 x 64 blocks that is seen."""
    backend = "triton" if device == "cuda" else "torch"
    rows = []
    for n in tokens:
        tensors = _inputs(n, 1, device)
        for share in shares:
            gen = torch.Generator().manual_seed(1)
            side = -(-n // 64)
            blocks = torch.rand(1, HEADS, side, side, generator=gen) < share
            blocks |= torch.eye(side, dtype=torch.bool)
            blocks = blocks.to(device)

            def ours(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor = blocks) -> Tensor:
                return op.block_sparse_attention(q, k, v, blocks, 64, 64, DIM**-0.5, backend)

            def truth(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor = blocks) -> Tensor:
                wide = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)
                mask = wide[:, :, : q.shape[2], : k.shape[2]]
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

            seen = float(blocks.float().mean())
            head: Row = {"keys by": "blocks of 64", "N": n, "K": round(seen * n)}
            head["K / N"] = round(seen, 4)
            rows.append(_measure(head, ours, truth, tensors, max(3, rounds // 3), clock))
    return rows


def run_topk(tokens: Iterable[int], rounds: int, device: str, clock: str) -> list[Row]:
    """The quarter of the columns of largest low-rank score, beside the scores in full."""
    backend = "triton" if device == "cuda" else "torch"
    rows = []
    for n in tokens:
        gen = torch.Generator().manual_seed(0)
        coef = torch.softmax(torch.randn(1, HEADS, n, RANK, generator=gen), -1).to(device)
        basis = torch.rand(1, 1, RANK, n, generator=gen).to(device)
        keep = n // 4
        calls = {
            "full": lambda c=coef, b=basis, k=keep: (c @ b).topk(k, -1).indices,
            "ours": lambda c=coef, b=basis, k=keep: op.lowrank_topk(c, b, k, None, None, backend),
        }
        row: Row = {"operator": "lowrank_topk", "N": n, "K": keep, "rank": RANK}
        want = reference.lowrank_topk(coef[:, :1].cpu(), basis.cpu(), keep, None, None)
        got = calls["ours"]()[:, :1].cpu()
        row["agree"] = float((want == got).float().mean()) > 0.999  # fp32 sums may tie apart
        found = timing.summary(timing.interleaved(calls, rounds, clock=clock), "full")
        row["full ms"], row["ms"] = found["full"]["ms"], found["ours"]["ms"]
        row["ratio"] = found["ours"]["ratio"]
        rows.append(row)
    return rows


def overtakes(rows: list[Row], column: str = "forward ratio") -> list[str]:
    """For every N the largest K at which sparse is faster than dense."""
    out = []
    for n in sorted({int(str(row["N"])) for row in rows}):
        mine = [row for row in rows if row["N"] == n and isinstance(row[column], float)]
        faster = [int(str(row["K"])) for row in mine if float(str(row[column])) > 1]
        found = f"up to K = {max(faster)}" if faster else "at none of the K measured"
        out.append(f"N = {n}: faster than dense {found} ({column})")
    return out


def main() -> int:
    """Print the tables; exit 1 if any result disagrees."""
    made = options.parser(__doc__, rounds=9)
    made.add_argument("--tokens", type=int, nargs="*", default=list(cases.BENCH_TOKENS))
    made.add_argument("--keys", type=int, nargs="*", default=list(cases.BENCH_KEYS))
    made.add_argument("--part", choices=("index", "blocks", "topk"), nargs="*")
    args = options.read(made)
    parts = args.part or ["index", "blocks", "topk"]
    about = results.machine(args.device, args.threads)
    about |= {"rounds": args.rounds, "clock": args.clock}
    shared = (args.rounds, args.device, args.clock)
    agree = True
    with timing.threads(args.threads):
        for part in parts:
            if part == "index":
                rows = run_index(args.tokens, args.keys, *shared)
            elif part == "blocks":
                rows = run_blocks([n for n in args.tokens if n > 1000], (0.1, 0.25, 0.5), *shared)
            else:
                rows = run_topk(args.tokens, *shared)
            results.show(rows, about, args.csv)
            if part == "index":
                columns = ("forward ratio", "with backward ratio")
                print("\n".join(line for c in columns for line in overtakes(rows, c)))
            agree = agree and all(row["agree"] for row in rows)
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
