# SPDX-License-Identifier: Apache-2.0
"""The command ``visprune``: thin functions over the library; each imports what it runs."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from visprune.cli.calibrate import calibrate
from visprune.cli.checks import check_drawing
from visprune.cli.study import compare, evaluate
from visprune.cli.words import overrides_of
from visprune.core.registry import Registry
from visprune.errors import ConfigError, VispruneError, did_you_mean
from visprune.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Vision-language models and vision transformers that look at fewer tokens.",
)


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main() -> None:
    """Run the command line; an error of ours is one line on stderr and exit code 2."""
    try:
        app()
    except VispruneError as error:
        # Plain print: rich would break the line at the terminal's width and read [..] as markup.
        said = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"visprune: {' '.join(said.split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        where = f" {str(error.filename)!r}" if error.filename else ""
        print(f"visprune: cannot write{where}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"visprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Read the options that stand before the command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for table, plot and pictures.")] = Path(
        "demo-out"
    ),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions to ask.", show_default="504")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="2")
    ] = None,
) -> None:
    """Compare methods and budgets on the embedded model, offline: a table, a plot, pictures."""
    # Read once, when PyTorch's OpenMP loads. Threads that wait long for each other by spinning make
    # two cores up to ten times slower than one where other programs run.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from visprune.eval.demo.run import run_demo

    run_demo(out=out, limit=limit, threads=threads)


@app.command()
def show(
    picture: Annotated[Path, typer.Argument(help="Any image file.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    method: Annotated[str, typer.Option(help="A name from `visprune methods`.")] = "todre",
    num_keep: Annotated[int, typer.Option(min=1, help="Visual tokens to keep.")] = 64,
    out: Annotated[Path, typer.Option(help="Where to write the drawing.")] = Path("kept.png"),
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model, or its name on the Hub.", show_default="embedded"),
    ] = None,
    pad: Annotated[
        bool, typer.Option(help="Show the picture whole, in a square, as LLaVA's evaluation does.")
    ] = False,
) -> None:
    """Draw which patches of a picture a model still sees."""
    check_drawing(picture, method, model)
    from visprune.eval.show.vlm import show as draw

    draw(
        picture, question=question, method=method, num_keep=num_keep, out=out, model=model, pad=pad
    )


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="Folder of a model, its name on the Hub, or embedded.")
    ],
    picture: Annotated[
        Path | None, typer.Option(help="Any image file.", show_default="a drawn one")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    attention: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2 ...", show_default="its own")
    ] = None,
) -> None:
    """Show that pruning a model is safe: the contract, in numbers, on your own model."""
    from visprune.eval.models.names import check_kind

    check_kind(model)
    from visprune.eval.check.run import check as run_check

    report = run_check(model, picture=picture, dtype=dtype, device=device, attention=attention)
    typer.echo(report)
    if not report.safe:
        raise typer.Exit(1)


app.add_typer(calibrate, name="calibrate")
app.command("eval")(evaluate)
app.command()(compare)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A folder that `visprune eval` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to.", show_default="RESULTS/report")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Samples of each task that the page lets you look at.")
    ] = 60,
) -> None:
    """Make tables (Markdown, CSV, LaTeX) and one HTML page from the records of a folder."""
    from visprune.eval.records.place import check_results

    check_results(results)
    from visprune.eval.report import write_report

    for path in write_report(results, out, samples=samples).values():
        typer.echo(path)


@app.command()
def methods(
    page: Annotated[
        bool, typer.Option("--page", help="What each does, where, and at what cost: Markdown.")
    ] = False,
) -> None:
    """List the pruning methods, one line each, and whose number of tokens is not tokens a layer."""
    from visprune.catalog import methods as registry

    if page:
        from visprune.eval.report.methods import measured_columns
        from visprune.machine.facts import page as written

        typer.echo(written(measured_columns()), nl=False)
        return
    from visprune.catalog import labels

    _print_registry(registry)
    typer.echo("\nWhere a number of tokens is not what a layer sees (576 tokens, 32 layers):")
    for name, label in labels().items():
        typer.echo(f"  {name}: {label}")


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="A family, to be told all of it.", show_default="all")
    ] = None,
) -> None:
    """List the model families and encoders that can be pruned; of one, the methods it takes."""
    from visprune.machine.listing import list_models

    rows = {row.name: row for row in list_models()}
    if name is None:
        _print_lines({key: str(row) for key, row in rows.items()})
        return
    if name not in rows:
        raise ConfigError(
            f"Unknown model family {name!r}.{did_you_mean(name, rows)} Known: {', '.join(rows)}. "
            f"Others of transformers are tried with a generic adapter: visprune check MODEL."
        )
    row = rows[name]
    _print_lines(
        {
            "models": row.models,
            "takes": row.takes,
            "shows": ", ".join(row.signals) or "nothing of its encoder",
            "cost": "counted" if row.cost else "not known",
            **({"needs": row.needs} if row.needs else {}),
            "proved": f"on tiny models, with {row.proved}",
            "methods": ", ".join(row.methods),
        }
    )


@app.command("serve-info")
def serve_info(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder of a model, or its name on the Hub.", show_default="any"),
    ] = None,
) -> None:
    """Say what visprune does in a vLLM server here: its version, architectures, methods."""
    from visprune.serving.info import serve_info as describe

    for line in describe(model):
        typer.echo(line)


@app.command()
def tasks() -> None:
    """List the tasks that models can be evaluated on, one line each."""
    from visprune.eval.tasks.base import tasks as registry

    _print_registry(registry)


@app.command(
    # `bench NAME --help` is of the benchmark; that of the command itself is printed below.
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="prefill, decode, cache, methods, vit, serving, eval, or a kernel."),
    ],
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw what the kernel computes instead of timing it.")
    ] = False,
) -> None:
    """Measure speed, once the results agree. Options after NAME go to that benchmark."""
    if name in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    found = _drawings() if draw else _benchmarks()
    if name not in found:
        raise ConfigError(
            f"Unknown {'drawing' if draw else 'benchmark'} {name!r}."
            f"{did_you_mean(name, found)} Known: {', '.join(found)}."
        )
    sys.argv = [f"visprune bench {'--draw ' * draw}{name}", *context.args]
    importlib.import_module(found[name]).main()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A recipe, such as configs/train/NAME.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and weights.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="In place of the recipe's; keys dotted."),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="The same as an option; repeat it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train by a recipe."""
    from visprune.train import train as run_training

    pairs = [*(overrides or []), *(override or [])]
    run_training(config, out, overrides=overrides_of(pairs), resume=resume)


def _benchmarks() -> dict[str, str]:
    """Return benchmark name to module: of whole models, and of every ``kernels/NAME/bench.py``."""
    root = Path(__file__).parents[1]
    ours = {
        name: f"visprune.eval.speed.bench_{name}"
        for name in ("cache", "decode", "eval", "methods", "prefill", "serving", "vit")
    }
    kernels = {
        path.parent.name: f"visprune.kernels.{path.parent.name}.bench"
        for path in sorted(root.glob("kernels/*/bench.py"))
    }
    return ours | kernels


def _drawings() -> dict[str, str]:
    """Return kernel name to the module that draws it."""
    return {"neighborhood_attention": "visprune.eval.show.neighborhood_attention"}


def _print_registry(registry: Registry) -> None:
    """Print each name with the first line of its docstring."""
    _print_lines({name: registry.summary(name) for name in registry})


def _print_lines(told: Mapping[str, str]) -> None:
    """Print each name with what is told of it."""
    width = max((len(name) for name in told), default=0)
    console = Console(highlight=False)
    for name, text in told.items():
        row = Text(f"{name:<{width}}  {text}")
        if console.is_terminal:  # a pipe gets the whole line
            row.truncate(console.width, overflow="ellipsis")
        console.print(row, soft_wrap=True)
