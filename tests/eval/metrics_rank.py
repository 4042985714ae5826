# SPDX-License-Identifier: Apache-2.0
"""One process of a distributed evaluation; run by test_metrics_distributed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from visprune.eval.metrics import (
    MME,
    POPE,
    ExactMatch,
    GQAAccuracy,
    LetterMatch,
    RECAccuracy,
    TopK,
    VQAAccuracy,
)

# Metric and its questions: every one updates with zip(*rows).
CASES: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "vqa": (
        VQAAccuracy,
        [("2", ["two"] * 5 + ["3"] * 5), ("red", ["red"] * 10), ("x", ["y"] * 10)],
    ),
    "gqa": (GQAAccuracy, [("Yes.", "yes"), ("no", "yes"), ("left", "left")]),
    "exact": (ExactMatch, [("A dog.", "dog"), ("", "dog"), ("cat", "dog")]),
    "letter": (LetterMatch, [("B", "B"), ("(a)", "B"), ("none", "C")]),
    "topk": (TopK, [("1 2 3 4 5", 1), ("5 4 3 2 1", 1), ("7", 1)]),
    "rec": (
        RECAccuracy,
        [("[0,0,1,1]", [0, 0, 1, 1]), ("?", [0, 0, 1, 1]), ("[0,0,.5,1]", [0, 0, 1, 1])],
    ),
    "pope": (
        POPE,
        [("yes", "yes", "random"), ("no", "yes", "popular"), ("Yes", "no", "adversarial")],
    ),
    # The two questions of picture "a" fall to different processes.
    "mme": (
        MME,
        [
            ("yes", "Yes", "count", "a"),
            ("no", "No", "count", "a"),
            ("other", "No", "OCR", "b"),
        ],
    ),
    # One process has nothing at all.
    "mme, one question": (MME, [("yes", "Yes", "count", "a")]),
    "pope, one question": (POPE, [("no", "yes", "random")]),
}


def figures(rank: int, world: int) -> dict[str, dict[str, float]]:
    """Compute every metric over the questions that fall to one of ``world`` processes."""
    found = {}
    for name, (make, rows) in CASES.items():
        metric = make()
        for row in rows[rank::world]:
            metric.update(*([value] for value in row))
        found[name] = metric.compute()
    return found


def main() -> None:
    """Join the group, compute, write what this process saw."""
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    out.write_text(json.dumps(figures(rank, world)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
