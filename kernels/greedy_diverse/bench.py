# SPDX-License-Identifier: Apache-2.0
"""Time ``greedy_diverse`` beside the same rule written over the full N x N matrix.

``python -m visprune.kernels.greedy_diverse.bench``: correctness first (equal sets, or no times),
then medians of interleaved rounds and the ratio to the baseline of the same round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from visprune.kernels.common import options, results, timing

from . import cases, op
from .reference import unit_rows

Row = dict[str, object]
_ANEW = "+anew"
RULES = {
    "k_center, farthest neighbour": ("k_center", "farthest_neighbor"),
    # The rule above; the baseline takes the minimum over all kept rows anew in each step, as the
    # published code does, instead of updating it.
    "k_center, minimum taken anew": ("k_center", "farthest_neighbor" + _ANEW),
    "k_center, pivot given": ("k_center", "given"),
    "max_sum, pivot given": ("max_sum", "given"),
    "dpp, with relevance": ("dpp", "relevance"),
}


def baseline_one(x: Tensor, k: int, objective: str, rule: str, rel: Tensor | None) -> Tensor:
    """The rule as published code does it: normalise, full N x N matrix, k steps over its rows."""
    xn = unit_rows(x)
    cos = xn @ xn.T
    if objective == "dpp":
        assert rel is not None
        return _baseline_dpp(rel[:, None] * cos * rel, k)
    distance = 1 - cos
    pick = 0
    anew = rule.endswith(_ANEW)
    if rule.removesuffix(_ANEW) == "farthest_neighbor":
        nearest = torch.topk(distance, 2, dim=0, largest=False).values[1]
        pick = int(nearest.argmax())
    order = torch.empty(k, dtype=torch.long)
    score = distance[pick].clone()
    for i in range(k):
        order[i] = pick
        if anew:
            score = distance.index_select(0, order[: i + 1]).amin(0)
            score[order[: i + 1]] = -torch.inf
        elif objective == "k_center":
            torch.minimum(score, distance[pick], out=score)
        elif i:
            score += distance[pick]
        score[pick] = -torch.inf
        pick = int(score.argmax())
    return order


def _baseline_dpp(kernel: Tensor, k: int) -> Tensor:
    order, rows = torch.empty(k, dtype=torch.long), kernel.new_zeros(k, len(kernel))
    residual = kernel.diagonal().clone()
    for i in range(k):
        pick = int(residual.argmax())
        order[i] = pick
        rows[i] = (kernel[pick] - rows[:i, pick] @ rows[:i]) / residual[pick].sqrt()
        residual -= rows[i].square()
        residual[pick] = -torch.inf
    return order


def _baseline(x: Tensor, k: int, objective: str, rule: str, rel: Tensor | None) -> Tensor:
    rows = [
        baseline_one(x[b], k, objective, rule, None if rel is None else rel[b])
        for b in range(len(x))
    ]
    return torch.stack(rows)


def _contestants(
    x: Tensor, k: int, objective: str, rule: str, rel: Tensor | None
) -> dict[str, Callable[[], Tensor]]:
    pivot = torch.zeros(len(x), dtype=torch.long, device=x.device) if rule == "given" else None
    args = (x, None, k, objective, rule.removesuffix(_ANEW), pivot, rel, None)
    run = {
        "baseline": lambda: _baseline(x, k, objective, rule, rel),
        "torch": lambda: op.greedy_diverse(*args, "torch"),
    }
    if x.is_cuda and not op.why_not(x):
        run["triton"] = lambda: op.greedy_diverse(*args, "triton")
    return run


def run(
    rounds: int = 7,
    threads: int = 2,
    shapes: Iterable[tuple[str, int, int, int]] = cases.BENCH_SHAPES,
    batches: Iterable[int] = (1, 8),
    kind: str = "normal",
    device: str = "cpu",
    rules: Iterable[str] = tuple(RULES),
    clock: str = "wall",
) -> list[Row]:
    """One row per shape, batch and rule.

    Args:
        rounds: timed rounds; in each every contestant runs once.
        threads: CPU threads.
        shapes: (name, tokens, kept, features).
        batches: images per call.
        kind: ``normal`` (nearly equidistant tokens, the hard case) or ``clustered``.
        device: ``cpu`` or ``cuda``.
        rules: keys of ``RULES``.
        clock: ``wall``, or ``cpu`` with one thread on a machine that is busy otherwise.

    Returns:
        Rows with milliseconds (medians) and ``ratio`` = baseline / ours. ``sets``: ``same``;
        ``same, baseline rounds`` where ours is the fp64 result and the fp32 baseline is not;
        ``DIFFER`` otherwise, and then no times.
    """
    rows: list[Row] = []
    with timing.threads(threads), torch.inference_mode():
        for _, n, k, dim in shapes:
            for batch in batches:
                gen = torch.Generator().manual_seed(0)
                x = torch.stack([cases.features(kind, n, dim, gen) for _ in range(batch)])
                rel = torch.rand(batch, n, generator=gen)
                for label in rules:
                    objective, rule = RULES[label]
                    given = rel.to(device) if objective == "dpp" else None
                    calls = _contestants(x.to(device), k, objective, rule, given)
                    check = _truth(x, k, objective, rule, rel)
                    head: Row = {"case": f"{n}/{k}", "d": dim, "batch": batch, "rule": label}
                    rows += _measure(head, calls, check, rounds, clock)
    return rows


def _truth(x: Tensor, k: int, objective: str, rule: str, rel: Tensor) -> Callable[[], Tensor]:
    """The baseline in fp64; computed only where the fp32 one disagrees with ours."""
    return lambda: _baseline(x.double(), k, objective, rule, rel.double())


def _measure(
    head: Row,
    calls: dict[str, Callable[[], Tensor]],
    truth: Callable[[], Tensor],
    rounds: int,
    clock: str,
) -> list[Row]:
    want = calls["baseline"]().cpu().sort(dim=1).values
    sets = {}
    for key, call in calls.items():
        got = call().cpu().sort(dim=1).values
        exact = torch.equal(got, want)
        rounded = not exact and torch.equal(got, truth().sort(dim=1).values)
        sets[key] = "same" if exact else "same, baseline rounds" if rounded else "DIFFER"
    fair = {key: call for key, call in calls.items() if sets[key] != "DIFFER"}
    result = timing.summary(timing.interleaved(fair, rounds, clock=clock), "baseline")
    rows = []
    for key in calls:
        if key == "baseline":
            continue
        row: Row = {**head, "path": key, "sets": sets[key]}
        row["baseline ms"] = result["baseline"]["ms"]
        row["ms"] = result[key]["ms"] if key in fair else "-"
        row["ratio"] = result[key]["ratio"] if key in fair else "-"
        rows.append(row)
    return rows


def main() -> int:
    """Print the table; exit 1 if any sets differ."""
    made = options.parser(__doc__, rounds=7)
    made.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    made.add_argument("--kind", choices=("normal", "clustered"), default="normal")
    made.add_argument("--rule", choices=tuple(RULES), nargs="*", default=list(RULES))
    # The baseline reads each pick back, which no graph can hold.
    made.set_defaults(clock="wall")
    args = options.read(made)
    rows = run(
        args.rounds, args.threads, batches=args.batch, kind=args.kind,
        device=args.device, rules=args.rule, clock=args.clock,
    )  # fmt: skip
    about = results.machine(args.device, args.threads)
    results.show(rows, {**about, "rounds": args.rounds, "clock": args.clock}, args.csv)
    return int(any(row["sets"] == "DIFFER" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
