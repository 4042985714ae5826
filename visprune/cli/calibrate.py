# SPDX-License-Identifier: Apache-2.0
"""``visprune calibrate``: settings of a method that are read off a model, a command for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from visprune.cli.words import overrides_of

calibrate = typer.Typer(
    no_args_is_help=True, help="Find a method's setting on one model, as its paper does."
)


@calibrate.command()
def vtw(
    model: Annotated[
        str, typer.Argument(help="Folder of a model, its name on the Hub, or embedded.")
    ],
    task: Annotated[
        str | None,
        typer.Option(help="A name from `visprune tasks`.", show_default="the embedded model's"),
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of the task; repeat it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 20,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Divergence (nats) that counts as none.")
    ] = 0.003,
    first: Annotated[int, typer.Option(min=0, help="First layer that is tried.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
) -> None:
    """Find the layer at which vtw may drop all visual tokens; exit code 1 where there is none."""
    from visprune.eval.calibrate.vtw import calibrate as find

    found = find(
        model, task=task, options=overrides_of(task_option or []), limit=limit,
        threshold=threshold, first=first, dtype=dtype, device=device,
    )  # fmt: skip
    typer.echo(found)
    if found.layer is None:
        raise typer.Exit(1)


@calibrate.command()
def heads(
    model: Annotated[
        str, typer.Argument(help="Folder of a model, its name on the Hub, or embedded.")
    ],
    pictures: Annotated[Path, typer.Option(help="Folder of picture files, at any depth.")],
    out: Annotated[Path, typer.Option(help="File to write, for duo_attention's gates=.")] = Path(
        "gates.json"
    ),
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="Asked of the pictures in turn; repeat it.", show_default="what is in it"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Pictures to read.", show_default="all")
    ] = None,
    keep_ratio: Annotated[
        float, typer.Option(help="Visual tokens that a streaming head would keep, a share.")
    ] = 0.1,
    sinks: Annotated[int, typer.Option(min=0, help="First ones among them.")] = 4,
    window: Annotated[int, typer.Option(min=1, help="Last queries that are looked at.")] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
) -> None:
    """Measure which key heads look past sinks and recent tokens: gates for duo_attention."""
    from visprune.eval.calibrate.heads import calibrate as measure

    asked: dict[str, Any] = {"questions": question} if question else {}
    found = measure(
        model, pictures, limit=limit, keep_ratio=keep_ratio, sinks=sinks, window=window,
        dtype=dtype, device=device, **asked,
    )  # fmt: skip
    typer.echo(found)
    typer.echo(f"wrote {found.write(out)}; use it as duo_attention(gates={str(out)!r})")
