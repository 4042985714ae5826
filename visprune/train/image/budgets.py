# SPDX-License-Identifier: Apache-2.0
"""Accuracy against multiply-adds and against measured images per second, models side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visprune.catalog import get_method
from visprune.errors import ConfigError
from visprune.eval.environment import describe, describe_line, writable_folder
from visprune.eval.speed.latency import Case, interleaved
from visprune.eval.stats import paired_bootstrap, wilson
from visprune.machine.run import prune
from visprune.machine.saved import load_pretrained
from visprune.train.image.batches import ImageData
from visprune.train.image.learner import data_config
from visprune.train.image.recipe import DataConfig, ModelConfig
from visprune.train.image.recipe import ImageRecipe as TrainRecipe
from visprune.train.image.student import count_macs
from visprune.train.sections import build_section

__all__ = [
    "BudgetsRecipe", "Row", "RowConfig", "all_pictures", "budget_words", "measure", "open_row",
]  # fmt: skip


@dataclass
class RowConfig:
    """One model.

    Attributes:
        name: Curve that it belongs to; rows of one name are joined in the plot.
        weights: Folder of :func:`visprune.save_pretrained`; its own method is in force.
        method: A method in place of the folder's.
        args: Its parameters.
        tuned: Whether the weights were trained with this method (for the table).
    """

    name: str
    weights: str
    method: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False


@dataclass
class BudgetsRecipe:
    """What to compare.

    Attributes:
        data: The validation pictures; the training ones only name the classes.
        rows: Models; the first is what the others are compared with.
        task: ``image_budgets``.
        batch: Pictures per forward, for accuracy and for speed.
        rounds: Timed forwards of each model, all taking turns; each runs once untimed before, as
            the first forward after a method was attached is not that of a model in use.
        threads: CPU threads, or None for torch's choice.
        device: ``cpu``, ``cuda`` ...
        seed: Seed of ``data.val_limit``.
    """

    data: DataConfig
    rows: list[Any]
    task: str = "image_budgets"
    batch: int = 64
    rounds: int = 10
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0


@dataclass
class Row:
    """A row's model, and the method that its folder names."""

    config: RowConfig
    model: Any
    run: Any

    def around(self) -> AbstractContextManager[Any]:
        """The method in force, for a method that the folder does not name."""
        if self.config.method is None:
            return nullcontext(self.run)
        return prune(self.model, get_method(self.config.method, **self.config.args))


def measure(
    raw: Mapping[str, Any], out: str | Path, where: str = "the recipe"
) -> list[dict[str, Any]]:
    """Score and time every row; write ``budgets.json``, ``budgets.md`` and ``budgets.png``.

    Args:
        raw: Content of the recipe's YAML.
        out: Folder to write into.
        where: The recipe's file, for messages.

    Returns:
        The rows of ``budgets.json``.

    Raises:
        ConfigError: The recipe, the data or a model's folder cannot be used.
    """
    recipe: BudgetsRecipe = build_section(BudgetsRecipe, raw, where)
    configs = [build_section(RowConfig, row, f"{where}, rows") for row in recipe.rows]
    if not configs or recipe.rounds < 1 or recipe.batch < 1:
        raise ConfigError(f"{where}: rows must not be empty, rounds and batch at least 1.")
    folder = writable_folder(out)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    rows = [open_row(config, recipe.device) for config in configs]
    images, labels = all_pictures(recipe.data, rows[0].model, recipe.batch, recipe.seed)
    found = [_score(row, images, labels, recipe.batch) for row in rows]
    seconds = _time(rows, images[: recipe.batch].to(recipe.device), recipe)
    table = _table(found, seconds, recipe.batch)
    environment = describe()
    content = {
        "rows": table,
        "pictures": len(labels),
        "environment": environment,
        "recipe": asdict(recipe),
    }
    (folder / "budgets.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    note = f"{len(labels)} pictures, batch {recipe.batch}; {describe_line(environment)}"
    text = markdown(table, note)
    (folder / "budgets.md").write_text(text, encoding="utf-8")
    draw(table, folder / "budgets.png")
    print(text)
    return table


def open_row(config: RowConfig, device: str) -> Row:
    """Load a row's model, without the folder's method where the row names another."""
    model, run = load_pretrained(config.weights)
    if config.method is not None and run is not None:
        run.remove()
        run = None
    return Row(config, model.to(device), run)


def all_pictures(data: DataConfig, model: Any, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """All validation pictures as the model wants them ``[N, 3, H, W]``, and labels ``[N]``."""
    found = ImageData(
        TrainRecipe(data, ModelConfig("unused"), batch=1, seed=seed), data_config(model)
    )
    if len(found.classes) != model.num_classes:
        raise ConfigError(
            f"{data.path} has {len(found.classes)} classes, the model {model.num_classes}."
        )
    batches = list(found.val_loader(batch, 0, 1))
    broken = [name for batch in batches for name in batch.broken]
    if broken:
        print(f"skipped: {'; '.join(broken)}", flush=True)
    good = [batch for batch in batches if len(batch.labels)]
    return torch.cat([b.images for b in good]), torch.cat([b.labels for b in good])


@torch.inference_mode()
def _score(row: Row, images: Tensor, labels: Tensor, batch: int) -> dict[str, Any]:
    """Which pictures a row gets right, and what one costs."""
    device = next(row.model.parameters()).device
    with row.around() as run:
        logits = [row.model(part.to(device)).float().cpu() for part in images.split(batch)]
        macs = count_macs(row.model, run, (images.shape[1], images.shape[2], images.shape[3]))
        method = None if run is None else run.method.to_dict()
    right = torch.cat(logits).argmax(-1) == labels
    config = row.config
    label = config.name if method is None else f"{config.name} {budget_words(method)}".strip()
    print(f"{label}: {float(right.float().mean()):.4f}, {macs / 1e6:.1f} MMACs", flush=True)
    return {
        "name": config.name,
        "label": label,
        "tuned": config.tuned,
        "weights": config.weights,
        "method": method,
        "macs": macs,
        "right": right,
    }


def budget_words(method: Mapping[str, Any]) -> str:
    """A method's budget, for the name of a row."""
    for key in ("r", "keep_ratio", "num_keep"):
        if method.get(key) is not None:
            return f"{key}={method[key]}"
    return ""


@torch.inference_mode()
def _time(rows: list[Row], images: Tensor, recipe: BudgetsRecipe) -> list[dict[str, float]]:
    """Images per second of each row, and its speed over the first row's, round by round."""
    cases = [
        Case(str(number), partial(_forward, row.model, images), row.around)
        for number, row in enumerate(rows)
    ]
    timings = interleaved(cases, rounds=recipe.rounds, warmup=1, device=recipe.device, settle=True)
    return [
        {
            "images_per_s": len(images) / (timings.median_ms(case.name) / 1e3),
            "speedup": 1 / timings.ratio(case.name, "0"),
        }
        for case in cases
    ]


def _forward(model: Any, images: Tensor, turn: int) -> Tensor:
    return model(images)


def _table(
    found: list[dict[str, Any]], seconds: list[dict[str, float]], batch: int
) -> list[dict[str, Any]]:
    base = found[0]["right"].float().tolist()
    table = []
    for row, speed in zip(found, seconds, strict=True):
        right = row.pop("right")
        hits, total = int(right.sum()), len(right)
        low, high = wilson(hits, total)
        change = paired_bootstrap(right.float().tolist(), base)
        table.append(
            {
                **row,
                "accuracy": 100 * hits / total,
                "interval": [100 * low, 100 * high],
                "change": {k: 100 * v for k, v in asdict(change).items()},
                "batch": batch,
                **speed,
            }
        )
    return table


def markdown(table: list[dict[str, Any]], note: str) -> str:
    """The rows as a Markdown table, a line on hardware below it."""
    lines = [
        "| model | trained with it | accuracy % | change [95 %] | GMACs | images/s | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        change = row["change"]
        first = row is table[0]
        lines.append(
            f"| {row['label']} | {'yes' if row['tuned'] or first else 'no'} | "
            f"{row['accuracy']:.2f} | "
            + ("" if first else f"{change['delta']:+.2f} [{change['low']:+.2f}, ")
            + ("" if first else f"{change['high']:+.2f}]")
            + f" | {row['macs'] / 1e9:.4f} | {row['images_per_s']:.0f} | {row['speedup']:.2f}x |"
        )
    return "\n".join([*lines, "", note, ""])


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against GMACs (left) and against images per second (right), a curve per name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["name"] for row in table))
    for number, name in enumerate(names):
        mine = sorted((r for r in table if r["name"] == name), key=lambda r: r["macs"])
        style = {"marker": "o", "markersize": 4, "color": f"C{number % 10}", "label": name}
        style["linestyle"] = "-" if len(mine) > 1 else "none"
        accuracy = [row["accuracy"] for row in mine]
        left.plot([row["macs"] / 1e9 for row in mine], accuracy, **style)
        right.plot([row["images_per_s"] for row in mine], accuracy, **style)
    left.set(xlabel="GMACs per picture", ylabel="accuracy %")
    right.set(xlabel="images per second, measured")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
