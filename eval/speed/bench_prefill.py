# SPDX-License-Identifier: Apache-2.0
"""`visprune bench prefill`: pruned prefill against dense, and against the ideal.

The ideal is the same model fed the short sequence from the start. Results are compared first:
a method whose logits differ from its ideal's on the same tokens is not timed.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from visprune.catalog import get_method
from visprune.core.method import PruningMethod
from visprune.errors import VispruneError
from visprune.eval.environment import describe, describe_line, set_threads, writable_folder
from visprune.eval.speed.ideal import SHAPES, Ideal, build, ideal_of, prompt
from visprune.eval.speed.latency import Case, Timings, interleaved
from visprune.machine.run import prune

__all__ = ["METHODS", "Pair", "agree", "main", "measure", "pair_up"]

METHODS: dict[str, dict[str, Any]] = {
    "random": {},
    "uniform": {},
    "pool": {},
    "divprune": {},
    "todre stage 1": {"stage2": False},
    "todre": {},
    "visionzip": {},
    "fastv": {},
}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Pair:
    """A method at a budget, and its ideal.

    Attributes:
        label: a key of ``METHODS``.
        num_keep: tokens kept.
        method: the method.
        ideal: what it is measured against.
        error: largest difference of their logits, relative to the largest logit.
    """

    label: str
    num_keep: int
    method: PruningMethod
    ideal: Ideal
    error: float

    @property
    def key(self) -> str:
        """Its name among the timed cases."""
        return f"{self.label} {self.num_keep}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the options say; print a table, write CSV and JSON."""
    options = parser("prefill").parse_args(argv)
    before = torch.get_num_threads()
    try:
        set_threads(options.threads)
        shape = "quick" if options.quick else options.shape
        model = build(shape, device=options.device, dtype=getattr(torch, options.dtype))
        budgets = [48] if options.quick else options.budgets
        rounds = 2 if options.quick else options.rounds
        rows = measure(model, shape, options.methods, budgets, rounds=rounds, batch=options.batch)
        _report(rows, options, shape)
    finally:
        torch.set_num_threads(before)


def parser(name: str) -> argparse.ArgumentParser:
    """The options that the prefill and the decode benchmark share."""
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(f"visprune bench {name}", description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--shape", choices=[s for s in SHAPES if s != "quick"], default="small",
        help="7b: LLaVA-1.5-7B's sizes; grouped: 2,916 visual tokens, 8 key heads")  # fmt: skip
    add("--budgets", type=int, nargs="+", default=[192, 128, 64], help="visual tokens kept")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
        help=f"some of: {', '.join(METHODS)}")  # fmt: skip
    add("--rounds", type=int, default=9, help="timed runs of each case")
    add("--batch", type=int, default=1)
    add("--threads", type=int, default=None, help="CPU threads (default: two)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        default="bfloat16" if cuda else "float32")  # fmt: skip
    add("--out", type=Path, default=Path("bench-out"), help="folder for CSV and JSON")
    add("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    return made


def pair_up(
    model: Any, inputs: dict[str, Tensor], label: str, num_keep: int, **params: Any
) -> Pair:
    """Run a method once, build its ideal from the tokens it kept, and compare their logits.

    Raises:
        VispruneError: the logits differ: whatever the method's time is, it is the wrong answer's.
    """
    params = {**METHODS.get(label, {}), **params}
    method = get_method(label.split()[0], num_keep=num_keep, **params)
    with torch.inference_mode():
        with prune(model, method) as run:
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
        ideal = ideal_of(model, inputs, run.trace)
        error = agree(logits, ideal(), f"{label} at {num_keep} tokens")
    return Pair(label, num_keep, method, ideal, error)


def agree(logits: Tensor, wanted: Tensor, what: str) -> float:
    """Return the largest difference relative to the largest wanted logit.

    Raises:
        VispruneError: it is above what the dtype's rounding explains.
    """
    wanted = wanted.float()
    error = float((logits.float() - wanted).abs().max() / wanted.abs().max())
    limit = _TOLERANCE[logits.dtype]
    if not error <= limit:
        raise VispruneError(
            f"{what}: its logits differ from the ideal's on the same tokens by {error:.2e} of the "
            f"largest (allowed: {limit:.0e}). No times are given for wrong answers."
        )
    return error


def measure(
    model: Any, shape: str, labels: Sequence[str], budgets: Sequence[int], *, rounds: int,
    batch: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time every method at every budget beside its ideal and beside the dense model.

    Returns:
        One row per method and budget. ``speedup`` and ``ideal_speedup`` are over the dense model,
        ``share`` is ideal time / method time; all three are medians over rounds of the ratio
        within a round.
    """
    inputs = prompt(model, shape, batch)
    pairs = []
    for num_keep in budgets:
        for label in labels:
            layer = {"layer": SHAPES[shape].fastv_layer} if label == "fastv" else {}
            pairs.append(pair_up(model, inputs, label, num_keep, **layer))

    def prefill(turn: int) -> Any:
        return model(**inputs, logits_to_keep=1).logits

    cases = [Case("dense", prefill)]
    for pair in pairs:
        cases.append(Case(f"ideal {pair.key}", pair.ideal))
        cases.append(Case(pair.key, prefill, attached(model, pair.method)))
    with Progress(transient=True) as bars, torch.inference_mode():
        bar = bars.add_task("taking turns", total=len(cases) * (rounds + 1))
        timings = interleaved(
            cases, rounds=rounds, device=model.device, after=lambda *_: bars.advance(bar)
        )
    return [_row(pair, timings) for pair in pairs]


def attached(model: Any, method: PruningMethod) -> Callable[[], AbstractContextManager[Any]]:
    """Return what attaches a method for the length of one timed run."""
    return lambda: prune(model, method)


def _row(pair: Pair, timings: Timings) -> dict[str, Any]:
    ideal = f"ideal {pair.key}"
    return {
        "method": pair.label,
        "num_keep": pair.num_keep,
        "dense_ms": timings.median_ms("dense"),
        "method_ms": timings.median_ms(pair.key),
        "ideal_ms": timings.median_ms(ideal),
        "speedup": timings.ratio("dense", pair.key),
        "ideal_speedup": timings.ratio("dense", ideal),
        "share": timings.ratio(ideal, pair.key),
        "method_iqr_ms": timings.iqr_ms(pair.key),
        "logits_error": pair.error,
    }


def _report(rows: list[dict[str, Any]], options: argparse.Namespace, shape: str) -> None:
    table = Table(title=f"Prefill, vision tower included: shape {shape}, batch {options.batch}, "
                        f"{options.dtype}", title_justify="left")  # fmt: skip
    table.add_column("method")
    for name in ("keep", "dense ms", "method ms", "ideal ms", "speed-up", "ideal's", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"], str(row["num_keep"]), f"{row['dense_ms']:.1f}",
            f"{row['method_ms']:.1f}", f"{row['ideal_ms']:.1f}", f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.2f}x", f"{100 * row['share']:.1f} %",
        )  # fmt: skip
    publish(table, rows, options, "prefill", shape)


def publish(
    table: Table, rows: list[dict[str, Any]], options: argparse.Namespace, name: str, shape: str,
    note: str = "Same logits as the ideal on the same tokens: checked before timing. ",
) -> None:  # fmt: skip
    """Print a table, and write its rows with what they were measured on."""
    folder = writable_folder(options.out)
    environment = describe()
    console = Console()
    (console if console.is_terminal else Console(width=120, file=console.file)).print(table)
    line = describe_line(environment)
    console.print(f"{note}{line}",
                  soft_wrap=True, highlight=False, markup=False)  # fmt: skip
    settings = {"shape": shape, "batch": options.batch, "dtype": options.dtype,
                "rounds": options.rounds, "device": options.device}  # fmt: skip
    record = {**environment, "settings": settings, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    console.print(f"Written: {folder / name}.json, .csv", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
