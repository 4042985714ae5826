# SPDX-License-Identifier: Apache-2.0
"""`visprune bench methods`: what choosing takes, beside the prefill of the untouched model.

Of every method, the milliseconds of its scores, its rule and its shortening behind the encoder, and
inside an encoder those of its rule; what is read of an encoder that stays whole is part of the
prefill. Methods take turns, and the untouched model after every few of them, so that what slows the
machine slows all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from visprune.catalog import get_method, list_methods, methods, parameters
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, VispruneError, did_you_mean
from visprune.eval.environment import set_threads
from visprune.eval.speed.bench_prefill import parser as prefill_parser
from visprune.eval.speed.bench_prefill import publish
from visprune.eval.speed.ideal import SHAPES, build, prompt
from visprune.machine.choose import now
from visprune.machine.plan import acts_on_cache
from visprune.machine.run import prune

__all__ = ["chosen", "main", "measure"]

# Beside the budget, for a model of fewer layers than the paper's, or where none is taken.
OPTIONS: dict[str, dict[str, Any]] = {"tome": {"r": 8}, "pitome": {"keep_ratio": 0.9}}
SHARE = 0.1
EVERY = 6  # methods between two prefills of the untouched model, which take most of the time


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the options say; print a table, write CSV and JSON."""
    options = parser().parse_args(argv)
    before = torch.get_num_threads()
    try:
        set_threads(options.threads)
        rows: list[dict[str, Any]] = []
        for shape in ["quick"] if options.quick else options.shapes:
            model = build(shape, device=options.device, dtype=getattr(torch, options.dtype))
            for batch in [2] if options.quick else options.batches:
                rounds = 1 if options.quick else options.rounds
                rows += measure(model, shape, options.methods, batch=batch, rounds=rounds)
        options.batch = options.batches
        publish(_table(rows), rows, options, "methods", ", ".join(options.shapes), note="")
    finally:
        torch.set_num_threads(before)


def parser() -> argparse.ArgumentParser:
    """The options of the prefill benchmark, of several shapes and batches."""
    made = prefill_parser("methods")
    made.description = __doc__.split("\n")[0]
    add = made.add_argument
    add("--shapes", nargs="+", choices=[s for s in SHAPES if s != "quick"],
        default=["small", "wide"], help="small: 576 tokens; wide: 2,916")  # fmt: skip
    add("--batches", type=int, nargs="+", default=[1, 8])
    made.set_defaults(methods=None, rounds=5)
    for action in made._actions:
        if action.dest == "methods":
            action.choices, action.help = None, "names of `visprune methods`; default: all"
    return made


def chosen(name: str, num_keep: int) -> PruningMethod:
    """A method at a budget, or at its own setting where it takes none."""
    budget = {"num_keep": num_keep} if "num_keep" in parameters(name) else {}
    return get_method(name, **OPTIONS.get(name, budget))


def measure(
    model: Any, shape: str, names: Sequence[str] | None, *, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Time every method on one shape; a method that the model cannot have has no row.

    Raises:
        ConfigError: an unknown name.
    """
    known = [n for n in list_methods() if not acts_on_cache(methods.get(n))]
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"{name!r} chooses nothing in a prefill.{did_you_mean(name, known)} Known: "
                f"{', '.join(known)}."
            )
    count = SHAPES[shape].visual_tokens
    num_keep = max(1, int(SHARE * count) if count > 576 else count // 9)
    inputs = prompt(model, shape, batch)
    built: dict[str, PruningMethod] = {}
    for name in names or known:
        try:
            prune(model, method := chosen(name, num_keep)).remove()
        except VispruneError:
            if names:
                raise
            continue
        built[name] = method
    whole: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in built}
    with Progress(transient=True) as bars, torch.inference_mode():
        bar = bars.add_task("taking turns", total=len(built) * (rounds + 1))
        for turn in range(rounds + 1):
            for number, (name, method) in enumerate(built.items()):
                if number % EVERY == 0:
                    begin = now(model.device)
                    model(**inputs, logits_to_keep=1)
                    if turn:  # the first round warms up
                        whole.append(now(model.device) - begin)
                taken = _selection(model, method, inputs)
                if turn:
                    spent[name].append(taken)
                bars.advance(bar)
    dense = median(whole)
    return [
        {
            "method": name, "tokens": count, "num_keep": getattr(method, "num_keep", None) or "",
            "batch": batch, "selection_ms": 1e3 * median(spent[name]), "prefill_ms": 1e3 * dense,
            "share": median(spent[name]) / dense,
        }
        for name, method in built.items()
    ]  # fmt: skip


def _selection(model: Any, method: PruningMethod, inputs: dict[str, Any]) -> float:
    """Seconds that choosing took in one prefill."""
    rules: list[float] = []

    def note(site: Any, tokens: Any, context: Any, selection: Any, seconds: float) -> None:
        if site.kind in ("pixels", "encoder"):
            rules.append(seconds)

    with prune(model, method) as run:
        run.observe(note)
        model(**inputs, logits_to_keep=1)
        return sum(rules) + run.trace.selection_seconds


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Selection beside the prefill of the untouched model, vision tower "
                        "included; medians", title_justify="left")  # fmt: skip
    table.add_column("method")
    for name in ("tokens", "keep", "batch", "selection ms", "prefill ms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"], str(row["tokens"]), str(row["num_keep"]), str(row["batch"]),
            f"{row['selection_ms']:.2f}", f"{row['prefill_ms']:.1f}", f"{100 * row['share']:.2f} %",
        )  # fmt: skip
    return table
