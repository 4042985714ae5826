# SPDX-License-Identifier: Apache-2.0
"""What the demo prints, writes and draws."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from visprune.eval.demo.rows import SEED, Measured
from visprune.eval.environment import describe, describe_line
from visprune.eval.models.base import NONE
from visprune.eval.show.figures import accuracy_flops
from visprune.eval.tasks.embedded import blind_floor, load

__all__ = ["report"]


def report(
    console: Console, folder: Path, rows: list[dict[str, Any]], measured: Measured,
    *, exact: bool,
) -> None:  # fmt: skip
    """Write the rows and what they were measured on, draw the plot, print the table.

    Args:
        console: where the table goes.
        folder: where the files go.
        rows: of the table.
        measured: what they were made of.
        exact: whether keep_all's logits were the untouched model's to the bit.
    """
    questions, pictures = rows[0]["n"], len(set(measured.clusters()))
    floor = blind_floor(load("test", questions))
    environment = describe()
    context = {
        **environment,
        "questions": questions,
        "pictures": pictures,
        "kinds": measured.kinds(),
        "blind_floor": floor,
        "timed_prompts": measured.speed[NONE]["rounds"],
        "untouched_prefill_ms": measured.prefill_ms(NONE)["median"],
        "untouched_kv_mib": measured.kv_mib(NONE),
        "keep_all_equals_untouched_to_the_bit": exact,
        "seeds": {"random": SEED, "bootstrap": SEED},
        "intervals": "accuracy: Wilson, 95 %; difference: bootstrap over pictures, 95 %",
    }
    _json(folder / "demo.json", rows)
    _json(folder / "run.json", context)
    with (folder / "demo.csv").open("w", newline="", encoding="utf-8") as file:
        flat = [_flat(row) for row in rows]
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    note = (
        f"Embedded model, {questions} questions about {pictures} unseen pictures. "
        f"{describe_line(environment)}"
    )
    accuracy_flops(
        rows, folder / "accuracy_flops.png", floor=floor["all"],
        vision_gflops=rows[0]["gflops_parts"]["vision"], note=note,
    )  # fmt: skip
    _print(console, rows, context)
    written = "demo.json, demo.csv, run.json, accuracy_flops.png, contact_sheet.png"
    for line in (
        f"Written to {folder}: {written}",
        f"Every answer: {folder / 'study'}. A page of it: visprune report {folder / 'study'}",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nesting: intervals become two columns, parts and kinds one each."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith("ci95"):
            flat[f"{key}_low"], flat[f"{key}_high"] = value
        elif key in ("per_kind", "gflops_parts"):
            prefix = {"per_kind": "accuracy", "gflops_parts": "gflops"}[key]
            flat.update({f"{prefix}_{name}": part for name, part in value.items()})
        elif key == "parameters":
            flat[key] = json.dumps(value)
        else:
            flat[key] = value
    return flat


def _print(console: Console, rows: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> None:
    table = Table(
        title="Fewer visual tokens: what it costs, what it saves", title_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("method", no_wrap=True)
    for name in ("keep", "accuracy %\n\\[95 %]", "vs keep_all\n\\[95 %]", "tokens\nper layer",
                 "GFLOPs", "prefill\nms", "speed-up", "KV\nMiB"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        low, high = (100 * x for x in row["ci95"])
        less, more = (100 * x for x in row["delta_ci95"])
        last = number + 1 == len(rows) or rows[number + 1]["method"] != row["method"]
        table.add_row(
            row["method"],
            str(row["num_keep"]),
            rf"{100 * row['accuracy']:.1f} \[{low:.0f}, {high:.0f}]",
            rf"{100 * row['delta']:+.1f} \[{less:+.0f}, {more:+.0f}]" if number else "",
            f"{row['tokens_mean']:.1f}",
            f"{row['gflops']:.2f}",
            f"{row['prefill_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['kv_mib']:.2f}",
            end_section=last,
        )
    floor = context["blind_floor"]["all"]
    table.add_row("blind floor", "0", f"{100 * floor:.1f}", "", "", "", "", "", "")
    wide = console if console.is_terminal else Console(width=100, file=console.file)
    wide.print(table)
    for line in _notes(context):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _notes(context: Mapping[str, Any]) -> list[str]:
    exact = "equal to the bit" if context["keep_all_equals_untouched_to_the_bit"] else "NOT EQUAL"
    return [
        f"{context['questions']} questions about {context['pictures']} unseen pictures. Blind "
        f"floor: the commonest answer of each kind. random draws from seed "
        f"{context['seeds']['random']}.",
        f"Prefill: batch 1, vision tower included, median of {context['timed_prompts']} prompts, "
        f"methods taking turns. Speed-up 1.00x is the untouched model: "
        f"{context['untouched_prefill_ms']:.1f} ms, {context['untouched_kv_mib']:.2f} MiB; its "
        f"logits and keep_all's are {exact}.",
        describe_line(dict(context)),
    ]
