# SPDX-License-Identifier: Apache-2.0
"""What was measured of each method, and what papers print, for the page of methods.

From the tables under ``eval/measured`` and the published ones of ``configs/studies``; a
distribution that comes without the former has no such columns.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import visprune
from visprune.eval.study.grid import read_study
from visprune.machine.facts import KEEP, Measured

__all__ = ["measured_columns"]

_ROOT = Path(visprune.__file__).parent
_FOLDER = _ROOT / "eval" / "measured"
_STUDY = _ROOT / "configs" / "studies" / "llava_1_5_7b.yaml"
_SHARE = "10 %"  # of the visual slots, of methods at the cache
# The embedded model tuned on other pictures: tables, and what the pictures are.
_TUNED = {"vg500_methods": "photos", "easy_vqa_methods": "easy-VQA"}

Row = Mapping[str, str]


def measured_columns(folder: Path = _FOLDER) -> list[Measured]:
    """Columns for :func:`visprune.machine.facts.page`; none where a file of theirs is not there.

    Args:
        folder: with ``methods_speed.csv`` (``visprune bench methods``), ``embedded_methods.csv``,
            ``embedded_cache.csv`` and the tables of tuned models (``visprune report``).
    """
    found = []
    if (rows := _rows(folder / "methods_speed.csv")) is not None:
        found.append(_speed(rows))
    if (rows := _rows(folder / "embedded_methods.csv")) is not None:
        found.append(_ours(rows, _rows(folder / "embedded_cache.csv") or []))
    for name, pictures in _TUNED.items():
        if (rows := _rows(folder / f"{name}.csv")) is not None:
            found.append(_tuned(rows, name, pictures))
    return [*found, _published()] if found else []


def _rows(path: Path) -> list[dict[str, str]] | None:
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _speed(rows: Iterable[Row]) -> Measured:
    """Selection at batch 1, by number of tokens."""
    alone = [row for row in rows if row["batch"] == "1"]
    counts = sorted({int(row["tokens"]) for row in alone})
    taken = {(row["method"], int(row["tokens"])): float(row["selection_ms"]) for row in alone}
    names = dict.fromkeys(row["method"] for row in alone)
    cells = {
        name: " / ".join(
            f"{taken[name, count]:.1f}" if (name, count) in taken else "-" for count in counts
        )
        for name in names
    }
    head = f"ms to choose, {' / '.join(f'{count:,}' for count in counts)} tokens"
    return Measured(
        head, cells,
        "selection beside one prefill of a random model at batch 1, two threads of an Intel Xeon "
        "([rows](eval/measured/methods_speed.csv)); `-`: not measured (the cache is cut behind "
        "the prefill, or the model had not what the method asks for).",
    )  # fmt: skip


def _at_budget(rows: Iterable[Row]) -> dict[str, Row]:
    """By method the row of the page's budget, or of the setting with the nearest tokens."""

    def off(row: Row) -> float:
        return abs(float(row["tokens"]) - KEEP)

    found = _by_method(rows, lambda row: bool(row["tokens"]) and row["method"] != "no_image")
    return {
        name: next((row for row in mine if row["num_keep"] == str(KEEP)), min(mine, key=off))
        for name, mine in found.items()
    }


def _ours(pruning: Iterable[Row], cache: Iterable[Row]) -> Measured:
    """Scores on the embedded model, at the page's budget."""
    cells = {
        name: f"{_score(row)}, {float(row['tokens']):.0f} tokens a layer"
        for name, row in _at_budget(pruning).items()
    }
    whole = 0.0
    for name, mine in _by_method(cache, lambda row: bool(row["kv_bytes"])).items():
        if name == "none":
            whole = float(mine[0]["kv_bytes"])
        if name in cells:
            continue
        at = [row for row in mine if row["label"].endswith(_SHARE)]
        bytes_kept = [float(row["kv_bytes"]) for row in mine]
        row = at[0] if at else mine[bytes_kept.index(min(bytes_kept))]
        share = f"{100 * float(row['kv_bytes']) / whole:.0f} % of the bytes" if whole else ""
        cells[name] = f"{_score(row)}, {row['label']}: {share}"
    untouched = next((row for row in pruning if row["method"] == "none"), None)
    about = "" if untouched is None else f" (untouched {float(untouched['score']):.1f})"
    asked = (
        "; methods at the cache with three questions in turn on one cache, other questions "
        "([rows](eval/measured/embedded_cache.csv)): compare within a group"
        if whole else ""
    )  # fmt: skip
    return Measured(
        "our own results, embedded model", cells,
        f"accuracy in % of the embedded model{about}, and the paired change with its 95 % "
        f"interval, at `num_keep={KEEP}` or the setting with the nearest number of tokens "
        f"([rows](eval/measured/embedded_methods.csv)){asked}. A small model on few drawn "
        f"pictures: most neighbours cannot be told apart, see "
        f"[eval/measured](eval/measured/README.md).",
    )  # fmt: skip


def _tuned(rows: Sequence[Row], name: str, pictures: str) -> Measured:
    """Changes of the score on other pictures, by a model that was tuned on such."""
    untouched = next(float(row["score"]) for row in rows if row["method"] == "none")
    cells = {name: _change(row) for name, row in _at_budget(rows).items() if row["delta"]}
    return Measured(
        f"the same on {pictures}", cells,
        f"paired change of the score of the embedded model tuned on {pictures} (untouched "
        f"{untouched:.1f} %) at the same budgets, with 95 % intervals "
        f"([rows](eval/measured/{name}.csv)).",
    )  # fmt: skip


def _by_method(rows: Iterable[Row], use: Callable[[Row], bool]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if use(row):
            found.setdefault(row["method"], []).append(row)
    return found


def _score(row: Row) -> str:
    score = f"{float(row['score']):.1f}"
    return f"{score} ({_change(row)})" if row["delta"] else score


def _change(row: Row) -> str:
    delta, low, high = (float(row[name]) for name in ("delta", "delta_low", "delta_high"))
    return f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]"


def _published() -> Measured:
    """What papers print at the page's budget; every table is a protocol of its own."""
    rows = read_study(_STUDY).published["rows"]
    sources = list(dict.fromkeys(str(row["source"]) for row in rows))
    said: dict[str, list[str]] = {}
    for row in rows:
        name, _, budget = str(row["label"]).rpartition(" ")
        if budget == str(KEEP):
            source = f"[{sources.index(str(row['source'])) + 1}]"
            said.setdefault(name, [source]).append(f"{row['task']} {row['score']:g}")
    whole = ", ".join(f"{x['task']} {x['score']:g}" for x in rows if x["label"] == "none")
    notes = "; ".join(f"[{n}] {source}" for n, source in enumerate(sources, 1))
    return Measured(
        "published", {name: " ".join(words) for name, words in said.items()},
        f"LLaVA-1.5-7B at {KEEP} tokens as papers count them, no run of ours: {notes}. "
        f"Untouched in [1]: {whole}. Tables of different sources are not to be compared, with "
        f"ours least of all.",
    )  # fmt: skip
