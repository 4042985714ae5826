# SPDX-License-Identifier: Apache-2.0
"""Reports from records alone: tables (Markdown, CSV, LaTeX) and one self-contained HTML page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

from visprune.errors import ConfigError
from visprune.eval.environment import writable_folder
from visprune.eval.report.build import build_tables
from visprune.eval.report.groups import all_averages
from visprune.eval.report.missing import missing_cells
from visprune.eval.report.page import build_page, payload
from visprune.eval.report.papers import attach_published
from visprune.eval.report.read import read_results
from visprune.eval.report.tables import to_averages_csv, to_csv, to_kinds_csv, to_latex, to_markdown

__all__ = ["write_report"]


def write_report(
    results: str | Path, out: str | Path | None = None, *, samples: int = 60, resamples: int = 2000
) -> dict[str, Path]:
    """Write the report of a results folder.

    Args:
        results: a folder that ``visprune eval --out`` wrote, finished or not.
        out: where to; ``None``: ``report/`` in the results folder.
        samples: how many samples of each task the page shows; 0: none.
        resamples: of the bootstrap.

    Returns:
        What was written: ``{"page", "markdown", "csv", "kinds", "averages", "latex"}``.

    Raises:
        ConfigError: no results, a damaged file, or a folder that cannot be written.
    """
    if samples < 0 or resamples < 100:
        raise ConfigError(
            f"A report takes samples >= 0 and resamples >= 100, got {samples} and {resamples}."
        )
    read = read_results(results)
    folder = writable_folder(out if out is not None else Path(results) / "report")
    tables = build_tables(read, resamples=resamples)
    published = attach_published(read.study, tables)
    means = all_averages(tables)
    missing = missing_cells(read.empty)
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    data = payload(read, tables, means, published, samples=samples, resamples=resamples, made=made)
    texts = {
        "page": ("report.html", build_page(data)),
        "markdown": ("tables.md", to_markdown(tables, means, missing)),
        "csv": ("tables.csv", to_csv(tables, missing)),
        "kinds": ("kinds.csv", to_kinds_csv(tables)),
        "averages": ("averages.csv", to_averages_csv(means)),
        "latex": ("tables.tex", to_latex(tables, means, missing)),
    }
    return _write(folder, texts)


def _write(folder: Path, texts: Mapping[str, tuple[str, str]]) -> dict[str, Path]:
    """Write every text below its name; returns where.

    Raises:
        ConfigError: the disk is full or fails.
    """
    written = {}
    for kind, (name, text) in texts.items():
        written[kind] = folder / name
        try:
            # Half of a surrogate pair, which a data set may hold, cannot be written as UTF-8.
            written[kind].write_bytes(text.encode("utf-8", "replace"))
        except OSError as error:
            raise ConfigError(
                f"Cannot write {str(written[kind])!r}: {error.strerror or error}. The records are "
                f"untouched; mend it and run the same command again."
            ) from error
    return written
