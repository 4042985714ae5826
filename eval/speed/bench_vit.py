# SPDX-License-Identifier: Apache-2.0
"""`visprune bench vit`: images per second of reduced and efficient ViTs beside a dense one.

What a reduction promises is the ratio of multiply-adds; `share` is how much of it is there on the
clock. `ideal` is the speed-up of the dense model on sequences of the same lengths, with nothing
that chooses (:mod:`visprune.eval.speed.ideal_vit`). Each runs once, untimed, before it is timed in
its turn; ``--compile`` compiles all of them. Before any timing, each method that keeps
everything must give the dense model's very bits. `top-1` is what was published of a model, at its
own size of pictures (:mod:`visprune.eval.speed.peers`); of methods nothing is known here.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import visprune.backbones.vit  # noqa: F401  registers litv2_*, nat_*, dinat_* in timm
from visprune.backbones.encoders.macs import counted_macs
from visprune.errors import ConfigError, VispruneError, did_you_mean
from visprune.eval.environment import describe, describe_line, set_threads, writable_folder
from visprune.eval.speed.ideal_vit import forward_shortened, has_ideal
from visprune.eval.speed.latency import Case, Timings, interleaved
from visprune.eval.speed.peers import PEERS, published
from visprune.machine.run import prune

__all__ = ["METHODS", "Entry", "attention_share", "check", "main", "measure"]

# (parameters, parameters that keep everything)
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tome r=13": ("tome", {"r": 13}, {"r": 0}),
    "tome r=8": ("tome", {"r": 8}, {"r": 0}),
    "evit 0.7": ("evit", {"keep_ratio": 0.7}, {"keep_ratio": 1.0}),
    "evit 0.5": ("evit", {"keep_ratio": 0.5}, {"keep_ratio": 1.0}),
    "topk 0.7": ("topk", {"keep_ratio": 0.7}, {"keep_ratio": 1.0}),
    "dynamicvit 0.7": ("dynamicvit", {"keep_ratio": 0.7}, {"keep_ratio": 1.0}),
    "pitome 0.925": ("pitome", {"keep_ratio": 0.925}, {"keep_ratio": 1.0}),
    "random 0.7": ("random", {"keep_ratio": 0.7}, {"keep_ratio": 1.0}),
}
ARCHITECTURES = ("litv2_s", "nat_mini", *PEERS)
_IDEAL = "ideal of "


@dataclass(frozen=True)
class Entry:
    """One thing to time beside the dense model.

    Attributes:
        name: a key of ``METHODS``, or a model.
        model: what runs.
        macs: multiply-adds of one picture, the method's own included.
        around: attaches the method.
        ideal: runs the dense model on as many tokens; None where that cannot be.
        pixels: what it is given, where it is not what the dense model is.
    """

    name: str
    model: Any
    macs: float
    around: Callable[[], AbstractContextManager[Any]]
    ideal: Callable[[int], Any] | None = None
    pixels: Tensor | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the options say; print a table, write CSV and JSON."""
    options = _options(argv)
    before = torch.get_num_threads()
    try:
        set_threads(options.threads)
        rows = []
        for batch in options.batches:
            rows += measure(
                options.model, batch, options.methods, options.architectures,
                rounds=options.rounds, size=options.size, depth=options.depth,
                device=options.device, dtype=getattr(torch, options.dtype),
                compiled=options.compile,
            )  # fmt: skip
        _report(rows, options)
    finally:
        torch.set_num_threads(before)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser("visprune bench vit", description=(__doc__ or "").split("\n")[0])
    add = made.add_argument
    add("--model", default="deit_small_patch16_224", help="any plain ViT of timm")
    add("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
        help=f"some of: {', '.join(METHODS)}")  # fmt: skip
    add("--architectures", nargs="*", default=list(ARCHITECTURES), metavar="MODEL",
        help="other models of timm, timed in the same rounds")  # fmt: skip
    add("--batches", type=int, nargs="+", default=[1, 8, 64])
    add("--rounds", type=int, default=9, help="timed runs of each case")
    add("--threads", type=int, default=None, help="CPU threads (default: two)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--compile", action="store_true", help="torch.compile everything: minutes for each case")
    add("--out", type=Path, default=Path("bench-out"), help="folder for CSV and JSON")
    add("--quick", action="store_true", help="two small layers: shows that it runs")
    options = made.parse_args(argv)
    options.size, options.depth = (112, 2) if options.quick else (224, None)
    if options.quick:
        options.batches, options.rounds, options.architectures = [2], 2, []
    return options


def build(name: str, *, depth: int | None, size: int, device: str, dtype: torch.dtype) -> Any:
    """A model with random weights; its speed does not depend on them.

    Raises:
        ConfigError: timm has none of that name.
    """
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise ConfigError(f"timm has no model {name!r}.{hint}")
    torch.manual_seed(0)
    extra: dict[str, Any] = {} if depth is None else {"depth": depth, "img_size": size}
    return timm.create_model(name, **extra).eval().to(device=device, dtype=dtype)


def check(model: Any, pixels: Tensor, label: str) -> None:
    """Compare the method that keeps everything with the dense model.

    Raises:
        VispruneError: a bit differs.
    """
    name, _, everything = METHODS[label]
    with torch.inference_mode():
        want = model(pixels)
        with prune(model, name, **everything):
            got = model(pixels)
    if not torch.equal(got, want):
        raise VispruneError(
            f"{label}: keeping everything changes the output by "
            f"{float((got - want).abs().max()):.1e}. No times are given for wrong answers."
        )


def measure(
    name: str,
    batch: int,
    labels: Sequence[str],
    architectures: Sequence[str] = (),
    *,
    rounds: int = 9,
    size: int = 224,
    depth: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Time methods on a model, and other models, beside the dense model in the same rounds.

    Returns:
        One row per method and architecture. ``speedup`` is the median over rounds of dense time /
        its time within a round, ``promised`` the ratio of multiply-adds, ``share`` the one over the
        other, ``ideal`` the speed-up of the same token counts without the method (None for
        architectures, and for models of other blocks than timm's plain one).
    """
    made: dict[str, Any] = {"depth": depth, "size": size, "device": device, "dtype": dtype}
    dense = build(name, **made)
    pixels = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    entries = []
    for label in labels:
        check(dense, pixels, label)
        entries.append(_pruned(dense, label, pixels, compiled))
    entries += [_other(other, batch, made) for other in architectures]
    with prune(dense, "keep_all") as run:
        whole = run.cost().macs
    ready = functools.partial(torch.compile, dynamic=False) if compiled else _as_it_is
    cases = [Case(name, _on(ready(dense), pixels))]
    for entry in entries:
        own = pixels if entry.pixels is None else entry.pixels
        cases.append(Case(entry.name, _on(ready(entry.model), own), entry.around))
        if entry.ideal is not None:
            cases.append(Case(_IDEAL + entry.name, ready(entry.ideal)))
    # All of them are codes of one function, for which the compiler has a limit.
    limits = torch._dynamo.config.patch(recompile_limit=max(8, 2 * len(cases)))
    with Progress(transient=True) as bars, torch.inference_mode(), limits:
        warmup = 2 if batch < 32 else 1
        bar = bars.add_task(f"batch {batch}", total=len(cases) * (rounds + warmup))
        timings = interleaved(
            cases, rounds=rounds, warmup=warmup, device=device, after=lambda *_: bars.advance(bar),
            settle=batch < 32,
        )  # fmt: skip
    return [_row(name, batch, entry, whole, timings) for entry in entries]


def _other(name: str, batch: int, made: dict[str, Any]) -> Entry:
    """Another model, on pictures of the size that its accuracy was published for."""
    known = published(name)
    size = made["size"] if known is None else known.size
    model = build(name, **{**made, "size": size, "depth": None})
    macs = counted_macs(model, (3, size, size))
    pixels = torch.randn(batch, 3, size, size, device=made["device"], dtype=made["dtype"])
    return Entry(name, model, macs, nullcontext, pixels=pixels)


def _on(model: Any, pixels: Tensor) -> Callable[[int], Any]:
    return lambda turn: model(pixels)


def _as_it_is(what: Any) -> Any:
    return what


def _pruned(model: Any, label: str, pixels: Tensor, compiled: bool) -> Entry:
    """A method on the model; to be compiled, on one of its own, which it stays on."""
    method, params, _ = METHODS[label]
    with prune(model, method, **params) as run, torch.inference_mode():
        macs = run.cost().macs
        model(pixels[:1])
        counts = run.trace.tokens_per_layer[0], run.trace.mlp_tokens_per_layer[0]
    ideal = None
    if has_ideal(model):
        ideal = functools.partial(_shortened, model, pixels, *counts)
    if compiled:
        model = copy.deepcopy(model)
        prune(model, method, **params)
        return Entry(label, model, macs, nullcontext, ideal)
    return Entry(label, model, macs, lambda: prune(model, method, **params), ideal)


def _shortened(
    model: Any, pixels: Tensor, attended: Sequence[int], mapped: Sequence[int], turn: int
) -> Tensor:
    return forward_shortened(model, pixels, attended, mapped)


def _row(name: str, batch: int, entry: Entry, whole: float, timings: Timings) -> dict[str, Any]:
    speedup, promised = timings.ratio(name, entry.name), whole / entry.macs
    return {
        "dense": name,
        "method": entry.name,
        "batch": batch,
        "dense_images_s": 1e3 * batch / timings.median_ms(name),
        "images_s": 1e3 * batch / timings.median_ms(entry.name),
        "gmacs": entry.macs / 1e9,
        "dense_gmacs": whole / 1e9,
        "speedup": speedup,
        "promised": promised,
        "share": speedup / promised,
        "ideal": None if entry.ideal is None else timings.ratio(name, _IDEAL + entry.name),
        "iqr_ms": timings.iqr_ms(entry.name),
        "published_top1": None if (known := published(entry.name)) is None else str(known),
    }


def attention_share(model: Any, pixels: Tensor, kind: str = "attn", rounds: int = 5) -> float:
    """Part of a forward's time that is spent in the modules named ``kind``."""
    spent: list[float] = []

    @contextmanager
    def watched() -> Iterator[None]:
        begun: list[float] = []
        handles = []
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == kind:
                handles.append(module.register_forward_pre_hook(
                    lambda m, a: begun.append(time.perf_counter())))  # fmt: skip
                handles.append(module.register_forward_hook(
                    lambda m, a, o: spent.append(time.perf_counter() - begun.pop())))  # fmt: skip
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    with torch.inference_mode(), watched():
        model(pixels)
        spent.clear()
        begin = time.perf_counter()
        for _ in range(rounds):
            model(pixels)
        total = time.perf_counter() - begin
    return sum(spent) / total


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    folder, environment = writable_folder(options.out), describe()
    title = f"Beside {options.model}, {options.dtype}, {options.device}"
    title += ", compiled" if options.compile else ""
    table = Table(title=title, title_justify="left")
    table.add_column("method or model")
    columns = ("batch", "GMACs", "images/s", "dense", "speed-up", "promised", "share", "ideal",
               "top-1")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"], str(row["batch"]), f"{row['gmacs']:.3f}", f"{row['images_s']:.1f}",
            f"{row['dense_images_s']:.1f}", f"{row['speedup']:.2f}x", f"{row['promised']:.2f}x",
            f"{100 * row['share']:.0f} %",
            "" if row["ideal"] is None else f"{row['ideal']:.2f}x", row["published_top1"] or "",
        )  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=120, file=console.file)).print(table)
    line = "Keeping everything gave the dense model's bits: checked before. " + describe_line(
        environment
    )
    console.print(line, soft_wrap=True, highlight=False, markup=False)
    settings = {"model": options.model, "rounds": options.rounds, "dtype": options.dtype,
                "device": options.device, "compile": options.compile}  # fmt: skip
    record = {**environment, "settings": settings, "rows": rows}
    (folder / "vit.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with (folder / "vit.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    console.print(f"Written: {folder / 'vit'}.json, .csv", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
