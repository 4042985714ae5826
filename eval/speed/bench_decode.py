# SPDX-License-Identifier: Apache-2.0
"""`visprune bench decode`: time per generated token, pruned against dense.

Also against the ideal: the untouched model, generating after the short sequence from the start, or
of a method at the cache, over a plain cache of as many slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from visprune.catalog import get_method, list_methods, methods
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, VispruneError
from visprune.eval.environment import set_threads
from visprune.eval.speed import decode_cache
from visprune.eval.speed.bench_prefill import METHODS, agree, attached, parser, publish
from visprune.eval.speed.ideal import build, ideal_of, prompt
from visprune.eval.speed.latency import Case, Timings, interleaved
from visprune.machine.plan import acts_on_cache
from visprune.machine.run import prune

__all__ = ["main", "measure"]

_CHECKED = 8  # generated tokens whose logits are compared before anything is timed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the options say; print a table, write CSV and JSON."""
    options = _parser().parse_args(argv)
    before = torch.get_num_threads()
    try:
        set_threads(options.threads)
        shape = "quick" if options.quick else options.shape
        model = build(shape, device=options.device, dtype=getattr(torch, options.dtype))
        sizes = {
            "new_tokens": 12 if options.quick else options.new_tokens,
            "rounds": 5 if options.quick else options.rounds,
            "batch": options.batch,
        }
        budgets = [48] if options.quick else options.budgets
        cached = [name for name in options.methods if name not in METHODS]
        before_it = [name for name in options.methods if name in METHODS]
        rows = measure(model, shape, before_it, budgets, **sizes) if before_it else []
        rows += decode_cache.measure(model, shape, cached, budgets, **sizes) if cached else []
        _report(rows, options, shape)
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    made = parser("decode")
    made.set_defaults(budgets=[64], methods=["todre stage 1"], rounds=3)
    cached = [name for name in list_methods() if acts_on_cache(methods.get(name))]
    for action in made._actions:
        if action.dest == "methods":
            action.choices = [*METHODS, *cached]
            action.help = f"some of: {', '.join(METHODS)}; or at the cache: {', '.join(cached)}"
    made.add_argument("--new-tokens", type=int, default=512, help="tokens to generate")
    return made


def measure(
    model: Any, shape: str, labels: Sequence[str], budgets: Sequence[int], *, new_tokens: int,
    rounds: int, batch: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time generation under every method at every budget, beside dense and ideal.

    Time per token is that of ``new_tokens`` less that of one, over the tokens between. Positions
    close up (``"compact"``), so that plain ``generate`` on the short sequence is an oracle.

    Returns:
        One row per method and budget; ``speedup`` and ``share`` are of the times per token.

    Raises:
        ConfigError: fewer than two tokens, or a method that drops inside the decoder: there is
            no one short sequence for it.
        VispruneError: logits of the first tokens differ from the ideal's, or rounds were held up so
            long that a time per token is not above zero.
    """
    if new_tokens < 2:
        raise ConfigError(f"A time per token takes at least two new tokens, got {new_tokens}.")
    inputs = prompt(model, shape, batch)
    cases, keys = _cases("dense", model, inputs, new_tokens), []
    for num_keep in budgets:
        for label in labels:
            method, short = _checked(model, inputs, label, num_keep)
            around = attached(model, method)
            cases += _cases(f"ideal {label} {num_keep}", model, short, new_tokens)
            cases += _cases(f"{label} {num_keep}", model, inputs, new_tokens, around)
            keys.append((label, num_keep))
    with Progress(transient=True) as bars, torch.inference_mode():
        bar = bars.add_task("taking turns", total=len(cases) * rounds)
        timings = interleaved(
            cases, rounds=rounds, warmup=0, device=model.device, after=lambda *_: bars.advance(bar)
        )
    return [_row(label, num_keep, timings, new_tokens) for label, num_keep in keys]


def _generate(model: Any, inputs: dict[str, Tensor], tokens: int, **options: Any) -> Any:
    return model.generate(
        **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, **options
    )


def _cases(
    name: str, model: Any, inputs: dict[str, Tensor], new_tokens: int, around: Any = None
) -> list[Case]:
    """A prompt generated from to the end, and to the first token."""
    extra = {} if around is None else {"around": around}
    return [
        Case(name, lambda _: _generate(model, inputs, new_tokens), **extra),
        Case(f"{name} first", lambda _: _generate(model, inputs, 1), **extra),
    ]


@torch.inference_mode()
def _checked(
    model: Any, inputs: dict[str, Tensor], label: str, num_keep: int
) -> tuple[PruningMethod, dict[str, Tensor]]:
    """Return a method and the short inputs it stands for, once the two generate the same."""
    params = {**METHODS[label], "positions": "compact"}
    method = get_method(label.split()[0], num_keep=num_keep, **params)
    want = {"return_dict_in_generate": True, "output_logits": True}
    with prune(model, method) as run:
        got = _generate(model, inputs, _CHECKED, **want)
        trace = run.trace
    ideal = ideal_of(model, inputs, trace)
    if ideal.drops:
        raise ConfigError(
            f"{label} drops tokens inside the decoder, so its ideal is no one short sequence. "
            f"bench decode takes methods that act at the projector."
        )
    mask = torch.ones(ideal.embeds.shape[:2], dtype=torch.long, device=ideal.embeds.device)
    short = {"inputs_embeds": ideal.embeds, "attention_mask": mask}
    wanted = _generate(model, short, _CHECKED, **want)
    pairs = zip(got.logits, wanted.logits, strict=True)
    for step, (ours, theirs) in enumerate(pairs):
        agree(ours, theirs, f"{label} at {num_keep} tokens, generated token {step}")
    if not torch.equal(got.sequences[:, -_CHECKED:], wanted.sequences[:, -_CHECKED:]):
        raise VispruneError(f"{label} at {num_keep} tokens: other tokens than the ideal's.")
    return method, short


def _per_token(timings: Timings, name: str, new_tokens: int) -> list[float]:
    """Seconds per token after the first, by round."""
    pairs = zip(timings.seconds[name], timings.seconds[f"{name} first"], strict=True)
    return [(whole - first) / (new_tokens - 1) for whole, first in pairs]


def _row(label: str, num_keep: int, timings: Timings, new_tokens: int) -> dict[str, Any]:
    ours, ideal, dense = (
        _per_token(timings, name, new_tokens)
        for name in (f"{label} {num_keep}", f"ideal {label} {num_keep}", "dense")
    )
    if min(map(median, (ours, ideal, dense))) <= 0:
        raise VispruneError(
            f"{label} at {num_keep} tokens: {new_tokens} new tokens came out no slower than one in "
            f"the median of {len(ours)} rounds, so the machine was held up. Give more --rounds."
        )
    return {
        "method": label,
        "num_keep": num_keep,
        "new_tokens": new_tokens,
        "dense_ms_per_token": 1e3 * median(dense),
        "method_ms_per_token": 1e3 * median(ours),
        "ideal_ms_per_token": 1e3 * median(ideal),
        "speedup": median(a / b for a, b in zip(dense, ours, strict=True)),
        "ideal_speedup": median(a / b for a, b in zip(dense, ideal, strict=True)),
        "share": median(a / b for a, b in zip(ideal, ours, strict=True)),
    }


def _report(rows: list[dict[str, Any]], options: argparse.Namespace, shape: str) -> None:
    table = Table(title=f"Decode, {rows[0]['new_tokens']} tokens: shape {shape}, batch "
                        f"{options.batch}, {options.dtype}", title_justify="left")  # fmt: skip
    table.add_column("method")
    for name in ("keep", "dense ms/token", "method", "ideal", "speed-up", "ideal's", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"], str(row["num_keep"]), f"{row['dense_ms_per_token']:.2f}",
            f"{row['method_ms_per_token']:.2f}", f"{row['ideal_ms_per_token']:.2f}",
            f"{row['speedup']:.2f}x", f"{row['ideal_speedup']:.2f}x", f"{100 * row['share']:.1f} %",
        )  # fmt: skip
    note = {}
    if any(name not in METHODS for name in options.methods):
        note["note"] = (
            "Before the decoder: same logits as the ideal, checked before timing. At the cache: "
            "the ideal's slots are random numbers, of which only the time counts. "
        )
    publish(table, rows, options, "decode", shape, **note)


if __name__ == "__main__":
    main()
