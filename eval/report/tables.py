# SPDX-License-Identifier: Apache-2.0
"""The tables as Markdown, LaTeX and CSV; the page shows the same rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from visprune.eval.report.efficiency import FLOP_PARTS, TIME_PARTS, by_size
from visprune.eval.report.formats import csv_text, figure, latex, markdown, scale
from visprune.eval.report.missing import NOT_IN_TABLES, Missing
from visprune.eval.report.read import NO_IMAGE
from visprune.eval.report.rows import Row, Table

__all__ = [
    "HOW_TO_READ", "to_averages_csv", "to_csv", "to_kinds_csv", "to_latex", "to_markdown",
]  # fmt: skip

Averages = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]  # by model and group of tasks

HOW_TO_READ = (
    "Brackets hold 95 % intervals from a bootstrap over pictures; a difference is paired, to the "
    "untouched model on the same samples; one of [+0.0, +0.0] says that no score changed here, not "
    "that none would. Tokens are visual tokens in the mean over decoder layers. FLOPs are two per "
    "multiply-add, per sample; times are medians, at batch 1 where no other is named. "
    "Agreement is the share of answers equal to the untouched model's. Errors are left out of the "
    "score; the column beside them scores them 0. * marks the front of score against FLOPs, + that "
    "of score against measured time."
)

FLOORS = (
    "Floors need no model and no picture. Commonest answer: every question gets the same answer, "
    "the one of the three commonest that scores best; of each kind: the commonest answer of the "
    "question's kind. Text-only prior: a question gets the commonest answer of the questions that "
    "begin with the same words, cross-fitted in ten folds of pictures; how many such questions it "
    "takes is learned from the other folds, and it is never below the commonest answer. Ties count "
    "in expectation; questions that failed in every run are left out. All are counted on the "
    "questions asked, not on a train split. The row no_image is the model itself, asked without "
    "the picture."
)

Column = tuple[str, Callable[[Row], str]]


def _number(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else ""


def _mark(row: Row) -> str:
    """Stars of the two fronts."""
    return ("*" if "flops" in row.pareto else "") + ("+" if "total_ms" in row.pareto else "")


def _method(row: Row) -> str:
    control = " (control)" if row.arm.control else ""
    return f"{row.arm.label}{control}{' ' + _mark(row) if row.pareto else ''}"


def _columns(table: Table) -> list[Column]:
    """All columns that hold something in some row."""
    unit = "%" if table.unit == "%" else "points"
    size, prefix = scale([row.cost.total_flops or 0.0 for row in table.rows])
    columns: list[Column] = [
        ("method", _method),
        (f"score, {unit}", lambda row: figure(row.score)),
        ("vs untouched", lambda row: figure(row.delta, sign=True)),
        ("n", lambda row: str(row.n)),
        ("tokens", lambda row: _number(row.cost.tokens)),
        (f"{prefix}FLOPs", lambda row: _number(row.cost.total_flops, 2, 1 / size)),
    ]
    columns += [
        (part, lambda row, part=part: _number(row.cost.flops.get(part), 2, 1 / size))  # type: ignore[misc]
        for part in _parts(table)
    ]
    columns += _times(table)
    columns += [
        ("KV MiB", lambda row: _number(row.cost.kv_bytes, 2, 2**-20)),
        ("peak GPU MiB", lambda row: _number(row.cost.peak_bytes, 0, 2**-20)),
        ("agreement %", lambda row: _number(row.agreement, 1, 100.0)),
        ("unparsed %", lambda row: _share(row.unparsed, row.answered)),
        ("yes %", lambda row: _number(row.yes_rate, 1, 100.0)),
        ("errors", lambda row: str(sum(row.errors.values()))),
        ("errors wrong", lambda row: _number(row.score_errors_wrong)),
        ("sd over seeds", lambda row: _number(row.spread, 2)),
        ("published", lambda row: ", ".join(f"{p['score']:g}" for p in row.published)),
    ]
    return [(name, get) for name, get in columns if any(get(row) for row in table.rows)]


def _times(table: Table) -> list[Column]:
    """Every part at the smallest batch that was measured, the whole at the others."""
    sizes = sorted({size for row in table.rows for size in row.cost.batches}, key=by_size)
    columns = []
    for size in sizes:
        parts = ("total_ms", *(TIME_PARTS[:-1] if size == sizes[0] else ()))
        columns += [(_time_name(part, size), _timed(part, size)) for part in parts]
    return columns


def _timed(part: str, size: str) -> Callable[[Row], str]:
    def get(row: Row) -> str:
        measured = row.cost.time(part, size)
        return "" if measured is None else f"{measured[0]:.1f}"

    return get


def _time_name(part: str, size: str) -> str:
    name = "ms per token" if part.endswith("per_token") else f"{part.removesuffix('_ms')} ms"
    return name if size == "1" else f"{name}, batch {size}"


def _parts(table: Table) -> list[str]:
    found = {part for row in table.rows for part in row.cost.flops}
    return [part for part in FLOP_PARTS if part in found] + sorted(found - {*FLOP_PARTS})


def caption(table: Table) -> str:
    """What the table is of, in one line."""
    floor = "".join(f"; {name}: {value:.1f}" for name, value in floor_list(table))
    blind = next((row.score for row in table.rows if row.arm.method == NO_IMAGE), None)
    floor += f"; without the picture: {blind[0]:.1f}" if blind else ""
    wanted = next((row.yes_wanted for row in table.rows if row.yes_wanted is not None), None)
    yes = f"; yes among references: {100 * wanted:.1f} %" if wanted is not None else ""
    return (
        f"{table.metric}, {table.samples} samples of {table.pictures} pictures, prompts "
        f"{table.prompt_style or 'as recorded'}{floor}{yes}"
    )


def floor_list(table: Table) -> list[tuple[str, float]]:
    """The floors by the names that people read; that of the kinds where there are several."""
    if table.floors is None:
        return []
    found = [("commonest answer", table.floors.majority)]
    if len(table.kinds) > 1 and table.floors.per_kind is not None:
        found.append(("commonest answer of each kind", table.floors.per_kind))
    return [*found, ("text-only prior", table.floors.prior)]


def _averaged(averages: Averages) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and body of each table of averages."""
    for (model, group), rows in averages.items():
        title = f"{model}, {group}" if group else model
        body = [
            [row["arm"].label, figure(row["score"]), figure(row["delta"], sign=True),
             _number(row["cost"]["tokens"])] for row in rows
        ]  # fmt: skip
        head = ["method", "score", "vs untouched", "tokens"]
        yield f"{title}: mean over tasks, % of the untouched model", head, body


def to_markdown(
    tables: Sequence[Table], averages: Averages, missing: Sequence[Missing] = ()
) -> str:
    """All tables, a heading each; the average over tasks comes first, what is missing last."""
    parts = []
    for title, head, body in _averaged(averages):
        parts += [f"## {markdown(title)}", "", *_grid(head, body)]
    for table in tables:
        columns = _columns(table)
        parts += [
            f"## {markdown(f'{table.model}: {table.task}')}",
            "",
            markdown(caption(table)),
            "",
        ]
        parts += _grid(
            [name for name, _ in columns], [[get(row) for _, get in columns] for row in table.rows]
        )
        if any(row.kinds for row in table.rows):
            kinds = list(dict.fromkeys(kind for row in table.rows for kind in row.kinds))
            parts += [f"### By kind, {table.unit if table.mean else 'mean per sample, %'}", ""]
            parts += _grid(
                ["method", *kinds],
                [[row.arm.label, *(figure(row.kinds.get(kind, {}).get("score")) for kind in kinds)]
                 for row in table.rows],
            )  # fmt: skip
        parts += [f"- {markdown(note)}" for note in table.notes] + ([""] if table.notes else [])
    if missing:
        parts += [f"## {NOT_IN_TABLES}", "", *(f"- {markdown(cell.text)}" for cell in missing), ""]
    about = [FLOORS] if any(table.floors for table in tables) else []
    return "\n\n".join(["\n".join(parts), *map(markdown, (HOW_TO_READ, *about))]) + "\n"


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table. Its head and first column are text, the rest numbers."""
    rows = [list(map(markdown, head)), *([markdown(row[0]), *row[1:]] for row in body)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = "| " + " | ".join([":---", *["---:"] * (len(head) - 1)]) + " |"
    return [lines[0], rule, *lines[1:], ""]


def to_latex(tables: Sequence[Table], averages: Averages, missing: Sequence[Missing] = ()) -> str:
    """All tables for a paper, in the order of the page; need ``booktabs`` and ``graphicx``."""
    parts = ["% \\usepackage{booktabs,graphicx}"]
    for title, head, cells in _averaged(averages):
        lines = [" & ".join(map(latex, row)) + r" \\" for row in cells]
        parts += _float(f"{latex(title)}. {latex(HOW_TO_READ)}", head, lines)
    for table in tables:
        columns = _columns(table)
        body = [" & ".join(latex(get(row)) for _, get in columns) + r" \\" for row in table.rows]
        breaks = [
            number for number, row in enumerate(table.rows)
            if number and row.arm.method != table.rows[number - 1].arm.method
        ]  # fmt: skip
        for number in reversed(breaks):
            body.insert(number, r"\midrule")
        about = f"{HOW_TO_READ} {FLOORS}" if table.floors else HOW_TO_READ
        title = latex(f"{table.model}, {table.task}: {caption(table)}.")
        parts += _float(f"{title} {latex(about)}", [name for name, _ in columns], body)
    if missing:
        items = [rf"\item {latex(cell.text)}" for cell in missing]
        head = [rf"\paragraph{{{NOT_IN_TABLES}}}", r"\begin{itemize}"]
        parts += [*head, *items, r"\end{itemize}", ""]
    return "\n".join(parts)


def _float(caption: str, head: Sequence[str], body: Sequence[str]) -> list[str]:
    """One table of lines that end with a break, as wide as the text."""
    return [
        r"\begin{table}[t]", r"\centering", rf"\caption{{{caption}}}",
        r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule", " & ".join(map(latex, head)) + r" \\", r"\midrule",
        *body, r"\bottomrule", r"\end{tabular}}", r"\end{table}", "",
    ]  # fmt: skip


def to_csv(tables: Sequence[Table], missing: Sequence[Missing] = ()) -> str:
    """One line per arm and task, everything that is known, without rounding.

    What is missing has a line too: no samples, and why in the column ``missing``.
    """
    rows = [_flat(table, row) for table in tables for row in table.rows]
    gone = [
        {"model": cell.model, "task": cell.task, "label": cell.label,
         "seeds": " ".join(map(str, cell.seeds)), "n": 0, "missing": cell.why}
        for cell in missing
    ]  # fmt: skip
    return _csv([*rows, *gone])


def to_kinds_csv(tables: Sequence[Table]) -> str:
    """One line per arm, task and kind."""
    return _csv(
        [
            {
                "model": table.model, "task": table.task, "label": row.arm.label,
                "kind": kind, "n": value["n"],
                **_ends("score", value["score"]), **_ends("delta", value["delta"]),
            }
            for table in tables for row in table.rows for kind, value in row.kinds.items()
        ]
    )  # fmt: skip


def to_averages_csv(averages: Averages) -> str:
    """One line per model, group of its tasks (empty: all) and arm, in % of the untouched model."""
    return _csv(
        [
            {
                "model": model, "group": group, "label": row["arm"].label,
                "method": row["arm"].method, "num_keep": row["arm"].num_keep,
                "control": row["arm"].control, **_ends("score", row["score"]),
                **_ends("delta", row["delta"]), **row["cost"], "pareto": " ".join(row["pareto"]),
            }
            for (model, group), rows in averages.items() for row in rows
        ]
    )  # fmt: skip


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _csv_value(value) for name, value in row.items()})
    return out.getvalue()


def _csv_value(value: Any) -> Any:
    """Text made harmless; an end that there is not (one picture) as an empty cell."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return csv_text(value) if isinstance(value, str) else value


def _ends(name: str, value: tuple[float, float, float] | None) -> dict[str, float | None]:
    middle, low, high = value or (None, None, None)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def _floors(table: Table) -> dict[str, float | None]:
    names = ("majority", "per_kind", "prior")
    return {f"floor_{name}": getattr(table.floors, name, None) for name in names}


def _flat(table: Table, row: Row) -> dict[str, Any]:
    arm, cost = row.arm, row.cost
    flat: dict[str, Any] = {
        "model": table.model, "task": table.task, "metric": table.metric, "unit": table.unit,
        "label": arm.label, "method": arm.method, "num_keep": arm.num_keep,
        "control": arm.control, "seeds": " ".join(map(str, row.seeds)), "n": row.n,
        "pictures": row.pictures, **_ends("score", row.score), **_ends("delta", row.delta),
        "paired": row.paired, "score_errors_wrong": row.score_errors_wrong,
        "sd_over_seeds": row.spread, "agreement": row.agreement, "unparsed": row.unparsed,
        "errors": sum(row.errors.values()), "yes_rate": row.yes_rate,
        "yes_wanted": row.yes_wanted, **_floors(table), "tokens": cost.tokens,
        "flops": cost.total_flops,
    }  # fmt: skip
    flat |= {f"flops_{part}": value for part, value in cost.flops.items()}
    flat |= {f"macs_{part}": value / 2 for part, value in cost.flops.items()}
    flat |= {"kv_bytes": cost.kv_bytes, "new_tokens": cost.new_tokens}
    flat |= {"peak_bytes": cost.peak_bytes}
    for batch, parts in cost.speed.items():
        for part, (median, q1, q3) in parts.items():
            names = (f"batch{batch}_{part}", f"batch{batch}_{part}_q1", f"batch{batch}_{part}_q3")
            flat |= dict(zip(names, (median, q1, q3), strict=True))
    flat |= {f"figure_{name}": value for name, value in row.figures.items() if name != "score"}
    flat["pareto"] = " ".join(row.pareto)
    flat["published"] = " ".join(f"{p['score']:g}" for p in row.published)
    flat["parameters"] = arm.parameters
    return flat
