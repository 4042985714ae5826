# SPDX-License-Identifier: Apache-2.0
"""What the demo prints, writes and draws."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from visprune.core.method import PruningMethod
from visprune.eval.demo.accuracy import Answers, Prompt, QuestionSet
from visprune.eval.environment import describe, describe_line
from visprune.eval.show.figures import Panel, accuracy_flops, contact_sheet
from visprune.eval.show.kept import kept_of, paint
from visprune.eval.speed.latency import Timings
from visprune.eval.stats import paired_bootstrap, wilson
from visprune.eval.tasks.embedded import blind_floor
from visprune.machine.run import prune

__all__ = ["BASELINE", "Entry", "Measured", "build_rows", "draw_sheet", "most_typical", "report"]

BASELINE = "untouched"
_SHEET_NOTE = (
    "What the model still sees of this picture under each method. A dropped patch lies under a "
    "veil. A pooled cell is one token, the mean of its patches. Below each picture stands the "
    "answer that the model then gives, and whether it is right. Of all questions for a digit, this "
    "is the most typical one: its answers fit the methods' accuracies best."
)
_PARTS = ("vision", "projector", "selection", "prefill", "lm_head")


@dataclass(frozen=True)
class Entry:
    """A method at a budget.

    Attributes:
        method: the method.
        num_keep: visual tokens that it may keep.
    """

    method: PruningMethod
    num_keep: int

    @property
    def key(self) -> str:
        """Its name among the timed cases."""
        return f"{self.method.name} {self.num_keep}"


@dataclass(frozen=True)
class Measured:
    """What the timed prefills gave.

    Attributes:
        timings: by entry, and of the untouched model.
        stored: bytes of keys and values in the cache after each, read off the tensors.
        prompts: how many were timed.
        keep_all_exact: whether keep_all's logits were the untouched model's to the bit.
    """

    timings: Timings
    stored: Mapping[str, Sequence[int]]
    prompts: int
    keep_all_exact: bool


def build_rows(
    asked: QuestionSet, entries: Sequence[Entry], answers: Mapping[str, Answers],
    measured: Measured, *, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return one row of ``demo.json`` per entry; the first entry is keep_all.

    Shares are in [0, 1]; ``delta`` is accuracy minus keep_all's on the same questions, its interval
    from a bootstrap over pictures; ``gflops`` per question, its picture's encoding included;
    ``prefill_ms`` a median with batch 1; ``speedup`` against the untouched model.
    """
    whole = answers[entries[0].key]
    clusters = [prompt.picture for prompt in asked.prompts]
    kinds = np.asarray([prompt.question.kind for prompt in asked.prompts])
    named = list(dict.fromkeys(kinds.tolist()))
    timings = measured.timings
    rows = []
    for entry in entries:
        got = answers[entry.key]
        paired = paired_bootstrap(got.right.tolist(), whole.right.tolist(), clusters, seed=seed)
        cost = got.cost.per_sample()
        row = {
            "method": entry.method.name,
            "num_keep": entry.num_keep,
            "accuracy": float(got.right.mean()),
            "ci95": list(wilson(int(got.right.sum()), len(got.right))),
            "delta": paired.delta,
            "delta_ci95": [paired.low, paired.high],
            "tokens_mean": got.tokens_mean,
            "gflops": cost["flops"] / 1e9,
            "prefill_ms": timings.median_ms(entry.key),
            "speedup": timings.median_ms(BASELINE) / timings.median_ms(entry.key),
            "kv_mib": float(np.mean(measured.stored[entry.key])) / 2**20,
            "prefill_iqr_ms": timings.iqr_ms(entry.key),
            "n": len(got.right),
            "agreement": float((got.predicted == whole.predicted).mean()),
            "gflops_parts": {part: 2 * cost[part] / 1e9 for part in _PARTS},
            "per_kind": {kind: float(got.right[kinds == kind].mean()) for kind in named},
            "parameters": entry.method.to_dict(),
        }
        rows.append(row)
    return rows


def report(
    console: Console, folder: Path, asked: QuestionSet, rows: list[dict[str, Any]],
    measured: Measured, *, seed: int,
) -> None:  # fmt: skip
    """Write the rows and what they were measured on, draw the plot, print the table."""
    floor = blind_floor(asked.pictures)
    environment = describe()
    context = {
        **environment,
        "questions": len(asked.prompts),
        "pictures": len(asked.pictures),
        "kinds": Counter(prompt.question.kind for prompt in asked.prompts),
        "blind_floor": floor,
        "timed_prompts": measured.prompts,
        "untouched_prefill_ms": measured.timings.median_ms(BASELINE),
        "untouched_kv_mib": float(np.mean(measured.stored[BASELINE])) / 2**20,
        "keep_all_equals_untouched_to_the_bit": measured.keep_all_exact,
        "seeds": {"random": seed, "bootstrap": seed},
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
        f"Embedded model, {len(asked.prompts)} questions about {len(asked.pictures)} unseen "
        f"pictures. {describe_line(environment)}"
    )
    accuracy_flops(
        rows, folder / "accuracy_flops.png", floor=floor["all"],
        vision_gflops=rows[0]["gflops_parts"]["vision"], note=note,
    )  # fmt: skip
    _print(console, rows, context)
    written = "demo.json, demo.csv, run.json, accuracy_flops.png, contact_sheet.png"
    console.print(f"Written to {folder}: {written}", soft_wrap=True, highlight=False, markup=False)


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


def most_typical(right: Sequence[np.ndarray], eligible: np.ndarray) -> int:
    """Return the question whose outcomes fit the accuracies of the entries best.

    A question picked for a picture by eye, or since methods differ on it, would flatter some of
    them. This one has the largest likelihood if each entry answered at its own accuracy.

    Args:
        right: per entry, which questions it answered, ``[n]`` bool.
        eligible: questions to choose among, ``[n]`` bool.

    Returns:
        The first of the best; the first of all if none is eligible.
    """
    outcomes = np.asarray(right, bool)  # [entries, n]
    if not eligible.any():
        return 0
    share = outcomes[:, eligible].mean(1, keepdims=True).clip(0.01, 0.99)
    likelihood = np.where(outcomes, np.log(share), np.log1p(-share)).sum(0)
    return int(np.where(eligible, likelihood, -np.inf).argmax())


@torch.inference_mode()
def draw_sheet(
    folder: Path, asked: QuestionSet, entries: Sequence[Entry], answers: Mapping[str, Answers],
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Draw what every entry keeps of one picture, and what the model then answers.

    Args:
        folder: where ``contact_sheet.png`` goes.
        asked: the questions; the sheet shows the one of :func:`most_typical`.
        entries: methods at budgets, keep_all first.
        answers: what each entry answered.
        advance: called after each entry.
    """
    reading = np.asarray([prompt.question.kind == "read" for prompt in asked.prompts])
    chosen = most_typical([answers[entry.key].right for entry in entries], reading)
    prompt = asked.prompts[chosen]
    image = asked.pictures[prompt.picture].image
    panels: dict[str, list[Panel]] = {}
    for entry in entries:
        with prune(asked.model, entry.method) as run:
            logits = asked.model(**asked.single(chosen), logits_to_keep=1).logits
        said = _answer(asked, prompt, int(logits[0, -1].argmax()))
        kept = kept_of(run.trace)
        real = "" if len(kept.index) == entry.num_keep else f" ({len(kept.index)} kept)"
        panel = Panel(paint(image, kept), f"“{said[0]}”{real}", said[1])
        panels.setdefault(entry.method.name, []).append(panel)
        advance()
    original = panels.pop(entries[0].method.name)[0]
    original = Panel(np.asarray(image), original.text, original.right)
    contact_sheet(
        original, panels, sorted({e.num_keep for e in entries[1:]}, reverse=True),
        folder / "contact_sheet.png", title=f"“{prompt.question.text}”", note=_SHEET_NOTE,
        about={e.method.name: _paper(e.method) for e in entries},
    )  # fmt: skip


def _paper(method: PruningMethod) -> str:
    """The first line of the method's module: what it does, and the paper."""
    line = (sys.modules[type(method).__module__].__doc__ or "").strip().partition("\n")[0]
    line = line.partition(": ")[2] or line
    return line[:1].upper() + line[1:]


def _answer(asked: QuestionSet, prompt: Prompt, token: int) -> tuple[str, bool]:
    return asked.processor.tokenizer.convert_ids_to_tokens(token), token == prompt.answer
