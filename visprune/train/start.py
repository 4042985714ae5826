# SPDX-License-Identifier: Apache-2.0
"""Start a run: read the YAML, apply overrides, hand it to what its ``task`` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from visprune.errors import ConfigError, did_you_mean

__all__ = ["TASKS", "train"]

TASKS = (
    *("embedded", "image_classification", "image_budgets", "image_probe"),
    *("vlm_lora", "vlm_finetune", "cache_scorer"),
)
_WITHOUT_WEIGHTS = ("image_budgets", "image_probe")
_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "config.json")
_OUR_MARKS = ("*.safetensors", "log.jsonl", "result.json", "trainer")


def train(
    config_path: str | Path,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train by a recipe.

    The recipe's key ``task`` says what it trains: ``image_classification``
    (:mod:`visprune.train.image`), ``image_budgets`` (nothing: it compares trained models,
    :mod:`visprune.train.image.budgets`), ``image_probe`` (heads on frozen encoders,
    :mod:`visprune.train.image.probe`), ``vlm_lora`` or ``vlm_finetune``
    (:mod:`visprune.train.vlm`), ``cache_scorer`` (networks that score slots of a cache,
    :mod:`visprune.train.vlm.scorer`), or without it the embedded model
    (:mod:`visprune.train.embedded.runner`).

    Args:
        config_path: Recipe, a YAML file.
        out: Folder for checkpoints, log and weights.
        overrides: Values that replace the recipe's, keys dotted: ``{"optimizer.lr": 1e-4}``.
        resume: Go on from the checkpoint in ``out``; without, an existing one is an error.

    Returns:
        What the run found; ``"weights"`` is the folder of the trained model.

    Raises:
        ConfigError: The recipe is wrong, ``out`` holds a checkpoint and ``resume`` is false, or
            ``out/weights`` a model that no such run wrote.
    """
    raw = read_yaml(config_path)
    task = (overrides or {}).get("task", raw.get("task", "embedded"))
    if task not in _WITHOUT_WEIGHTS:
        _check_weights(Path(out))
    if task == "embedded":
        from visprune.train.embedded.runner import train as train_embedded

        return train_embedded(config_path, out, overrides, resume)
    if task == "image_classification":
        from visprune.train.image import train as train_image

        return train_image(with_overrides(raw, overrides or {}), out, resume, str(config_path))
    if task == "image_budgets":
        from visprune.train.image.budgets import measure

        rows = measure(with_overrides(raw, overrides or {}), out, str(config_path))
        return {"rows": rows}
    if task == "image_probe":
        from visprune.train.image.probe import probe

        return {"rows": probe(with_overrides(raw, overrides or {}), out, str(config_path))}
    if task in ("vlm_lora", "vlm_finetune"):
        from visprune.train.vlm import train as tune

        return tune(with_overrides(raw, overrides or {}), out, resume, str(config_path))
    if task == "cache_scorer":
        from visprune.train.vlm.scorer import train as train_scorer

        return train_scorer(with_overrides(raw, overrides or {}), out, resume, str(config_path))
    raise ConfigError(
        f"{config_path}: task is {task!r}.{did_you_mean(str(task), TASKS)} "
        f"Allowed: {', '.join(TASKS)}."
    )


def _check_weights(out: Path) -> None:
    """Refuse a folder whose ``weights`` are a model from elsewhere, before anything is trained."""
    found = [name for name in _MODEL_FILES if (out / "weights" / name).exists()]
    if found and not any(next(out.glob(mark), None) for mark in _OUR_MARKS):
        raise ConfigError(
            f"{out / 'weights'} holds {' and '.join(found)} that no run of visprune train wrote "
            f"({out} has no log and no checkpoint of one), and the trained model would take their "
            f"place. Choose another folder for --out."
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: It is missing, no YAML, or no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {str(path)!r}; give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a recipe: it must be a mapping.")
    return raw


def with_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with dotted keys replaced; sections that are not there are made.

    Raises:
        ConfigError: A key leads through something that is no section.
    """
    result = _copied(raw)
    for key, value in overrides.items():
        place = result
        *way, name = key.split(".")
        for part in way:
            if place.get(part) is None:
                place[part] = {}
            if not isinstance(place[part], dict):
                raise ConfigError(f"Override {key!r}: {part!r} is {place[part]!r}, not a section.")
            place = place[part]
        place[name] = value
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return value
