# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a frozen encoder know, and what those that pruning keeps still know.

The encoder runs once over every picture, without augmentation; heads of
``visprune.backbones.vit.heads`` are trained on the tokens that it left, row by row, head by head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visprune.backbones.vit.heads import (
    MultiBranchAttention,
    MultiHeadBranches,
    ProbeHead,
    TokenProbe,
    branch_loss,
)
from visprune.errors import ConfigError
from visprune.eval.environment import describe, describe_line, writable_folder
from visprune.eval.stats import paired_bootstrap, wilson
from visprune.train.image.budgets import Row, RowConfig, all_pictures, budget_words, open_row
from visprune.train.image.recipe import DataConfig
from visprune.train.image.student import count_macs
from visprune.train.sections import build_section, known_name

__all__ = ["HEADS", "HeadConfig", "ProbeRecipe", "probe"]


def _linear(dim: int, classes: int) -> nn.Module:
    return ProbeHead(dim, classes, num_queries=0)


HEADS: dict[str, Any] = {
    "linear": _linear,
    "efficient_probing": ProbeHead,
    "branches": MultiBranchAttention,
    "head_branches": MultiHeadBranches,
}


@dataclass
class HeadConfig:
    """One head.

    Attributes:
        kind: A key of :data:`HEADS`.
        args: Its further arguments.
    """

    kind: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProbeRecipe:
    """What to probe.

    Attributes:
        data: The pictures: ``train`` for the heads, ``val`` for their score.
        rows: Encoders, as in :class:`visprune.train.image.budgets.BudgetsRecipe`; heads on the
            first are what the same heads on the others are compared with.
        heads: Heads, each trained on every row from the same start.
        task: ``image_probe``.
        epochs: Passes over the training tokens.
        batch: Pictures per step, and per forward of the encoder.
        lr: Highest learning rate of AdamW; it falls along a cosine.
        weight_decay: Of AdamW.
        threads: CPU threads, or None for torch's choice.
        device: ``cpu``, ``cuda`` ...
        seed: Seed of the heads, of the order and of limits on the data.
    """

    data: DataConfig
    rows: list[Any]
    heads: list[Any]
    task: str = "image_probe"
    epochs: int = 10
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0


def probe(
    raw: Mapping[str, Any], out: str | Path, where: str = "the recipe"
) -> list[dict[str, Any]]:
    """Train and score every head on every row; write ``probe.json`` and ``probe.md``.

    Args:
        raw: Content of the recipe's YAML.
        out: Folder to write into.
        where: The recipe's file, for messages.

    Returns:
        The rows of ``probe.json``.

    Raises:
        ConfigError: The recipe, the data or a model's folder cannot be used.
    """
    recipe: ProbeRecipe = build_section(ProbeRecipe, raw, where)
    configs = [build_section(RowConfig, row, f"{where}, rows") for row in recipe.rows]
    heads = [build_section(HeadConfig, head, f"{where}, heads") for head in recipe.heads]
    if not configs or not heads or min(recipe.epochs, recipe.batch) < 1 or recipe.lr <= 0:
        raise ConfigError(f"{where}: rows and heads must not be empty, epochs and batch at least "
                          "1, lr above 0.")  # fmt: skip
    for head in heads:
        known_name(head.kind, list(HEADS), f"{where}, heads: kind")
    folder = writable_folder(out)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    rows = [open_row(config, recipe.device) for config in configs]
    train = replace(recipe.data, val=recipe.data.train, val_limit=recipe.data.train_limit)
    parts = [
        all_pictures(data, rows[0].model, recipe.batch, recipe.seed)
        for data in (train, recipe.data)
    ]
    found = [_row(row, parts, heads, recipe) for row in rows]
    table = _table(found)
    environment = describe()
    content = {
        "rows": table,
        "pictures": [len(labels) for _, labels in parts],
        "environment": environment,
        "recipe": asdict(recipe),
    }
    (folder / "probe.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    counts = " for training, ".join(str(len(labels)) for _, labels in parts)
    text = markdown(table, f"{counts} pictures scored, {recipe.epochs} epochs; "
                           f"{describe_line(environment)}")  # fmt: skip
    (folder / "probe.md").write_text(text, encoding="utf-8")
    print(text)
    return table


def _row(
    row: Row, parts: list[tuple[Tensor, Tensor]], heads: list[HeadConfig], recipe: ProbeRecipe
) -> dict[str, Any]:
    """Which pictures each head gets right on the tokens of one encoder."""
    (images, labels), (val_images, val_labels) = parts
    encoder = TokenProbe(row.model, nn.Identity())
    with row.around() as run:
        train, val = (
            torch.cat([encoder.tokens(x.to(recipe.device)).cpu() for x in t.split(recipe.batch)])
            for t in (images, val_images)
        )
        shape = (images.shape[1], images.shape[2], images.shape[3])
        macs = count_macs(row.model, run, shape)
        method = None if run is None else run.method.to_dict()
    label = f"{row.config.name} {'' if method is None else budget_words(method)}".strip()
    right = {}
    for config in heads:
        torch.manual_seed(recipe.seed)
        try:
            head = HEADS[config.kind](train.shape[-1], row.model.num_classes, **config.args)
        except TypeError as error:
            raise ConfigError(f"Head {config.kind}: {error}.") from error
        head = head.to(recipe.device)
        _fit(head, train, labels, recipe)
        name = " ".join([config.kind, *(f"{k}={v}" for k, v in config.args.items())])
        right[name] = _right(head, val, val_labels, recipe)
        print(f"{label}, {name}: {float(right[name].mean()):.4f}", flush=True)
    return {
        "name": row.config.name,
        "label": label,
        "weights": row.config.weights,
        "method": method,
        "macs": macs,
        "tokens": train.shape[1],
        "heads": right,
    }


def _fit(head: nn.Module, tokens: Tensor, labels: Tensor, recipe: ProbeRecipe) -> None:
    """Train a head on tokens [N, T, D] that do not change."""
    steps = recipe.epochs * -(-len(labels) // recipe.batch)
    optimizer = torch.optim.AdamW(
        head.parameters(), recipe.lr, weight_decay=recipe.weight_decay
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(recipe.seed)
    head.train()
    for _ in range(recipe.epochs):
        for part in torch.randperm(len(labels), generator=order).split(recipe.batch):
            if len(part) == 1 and len(labels) > 1:
                continue  # a batch norm has nothing to learn from one picture
            x, y = tokens[part].to(recipe.device), labels[part].to(recipe.device)
            if isinstance(head, MultiBranchAttention | MultiHeadBranches):
                loss = branch_loss(head.forward_train(x), y)
            else:
                loss = F.cross_entropy(head(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def _right(head: nn.Module, tokens: Tensor, labels: Tensor, recipe: ProbeRecipe) -> Tensor:
    """1 for each picture that a head gets right, 0 for the others."""
    head.eval()
    logits = [head(part.to(recipe.device)).cpu() for part in tokens.split(recipe.batch)]
    return (torch.cat(logits).argmax(-1) == labels).float()


def _table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracies with intervals, and changes against the same head on the first row."""
    base = found[0]["heads"]
    table = []
    for row in found:
        scored = {}
        for name, right in row["heads"].items():
            low, high = wilson(int(right.sum()), len(right))
            change = paired_bootstrap(right.tolist(), base[name].tolist())
            scored[name] = {
                "accuracy": 100 * float(right.mean()),
                "interval": [100 * low, 100 * high],
                "change": {key: 100 * value for key, value in asdict(change).items()},
            }
        table.append({**row, "heads": scored})
    return table


def markdown(table: list[dict[str, Any]], note: str) -> str:
    """A line per row, a column per head, and a line on hardware below."""
    names = list(table[0]["heads"])
    lines = [
        f"| encoder | tokens | GMACs | {' | '.join(f'{name} %' for name in names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in table:
        cells = []
        for name in names:
            head = row["heads"][name]
            change = "" if row is table[0] else f" ({head['change']['delta']:+.2f})"
            cells.append(f"{head['accuracy']:.2f}{change}")
        lines.append(f"| {row['label']} | {row['tokens']} | {row['macs'] / 1e9:.4f} | "
                     f"{' | '.join(cells)} |")  # fmt: skip
    return "\n".join([*lines, "", note, ""])
