# SPDX-License-Identifier: Apache-2.0
"""Recipes: the YAML that a training run follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from visprune.errors import ConfigError, did_you_mean

STAGE_KINDS = ("oracle", "dense", "align", "joint")


@dataclass
class StageConfig:
    """One stage.

    Attributes:
        kind: What is trained, one of :data:`STAGE_KINDS`.
        start_from: Earlier stages whose weights it loads, in this order.
        steps: Optimiser steps.
        batch: Pictures per step.
        lr: Peak learning rate of AdamW.
        lr_decoder: Learning rate of the decoder where it differs (``joint``).
        warmup: Steps of linear warm-up.
        decay: Last share of the steps, over which the rate falls linearly to a hundredth.
        weight_decay: Weight decay of matrices.
        per_kind: Questions per picture: a number for every kind, or a number by kind.
        ramp: Size of a ramp that is added to the oracle's rows and columns when the stage starts
            (``oracle``): places become a linear feature, which answers need.
        signposts: Size of the place words that are added to them in the same way.
        tables: Whether words and places are trained too (``oracle``); without, a tower may learn
            to produce them at the same time.
        patches: Visual tokens shown to the decoder (``oracle``, ``joint``); 576 shows all.
        drop: Largest share of object patches hidden from the decoder.
        side: Side of the pictures, pixels (``dense``).
        objects: Fewest and most objects (``dense``).
        dense_weight: Weight of the per-patch losses beside the answers (``joint``).
        oracle_batch: Pictures per step that are asked about with symbolic tokens (``joint``).
        validate_every: Steps between validations.
        validate_pictures: Pictures of one validation.
        save_every: Steps between checkpoints.
    """

    kind: str
    start_from: list[str] = field(default_factory=list)
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3
    lr_decoder: float | None = None
    warmup: int = 100
    decay: float = 0.25
    weight_decay: float = 0.05
    per_kind: int | dict[str, int] = 2
    ramp: float = 0.0
    signposts: float = 0.0
    tables: bool = True
    patches: int = 576
    drop: float = 0.0
    side: int = 192
    objects: list[int] = field(default_factory=lambda: [3, 6])
    dense_weight: float = 0.3
    oracle_batch: int = 0
    validate_every: int = 250
    validate_pictures: int = 64
    save_every: int = 250


@dataclass
class EmbeddedRecipe:
    """A whole run.

    Attributes:
        stages: Stages by name, in the order they run.
        seed: Seed of weights and data.
        device: ``auto`` (CUDA if there is one), or a torch device.
        precision: ``fp32`` or ``bf16`` (autocast; weights and optimiser stay fp32).
        attention: Attention of transformers while training; on CPU in bf16 ``eager`` is 1.7 times
            as fast as ``sdpa`` at these sizes (forward and backward). The result is the same model.
        threads: CPU threads, or None for torch's choice.
        vision: Fields of the tower's configuration.
        text: Fields of the decoder's configuration.
        only: Names of the stages to run, or None for all.
        test_questions: Test questions of the final evaluation; 0 leaves it out.
    """

    stages: dict[str, StageConfig]
    seed: int = 0
    device: str = "auto"
    precision: str = "bf16"
    attention: str = "eager"
    threads: int | None = None
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    only: list[str] | None = None
    test_questions: int = 2100


def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> EmbeddedRecipe:
    """Read a recipe and check every name in it.

    Args:
        path: YAML file.
        overrides: Values that replace the file's; ``"seed"`` or ``"<stage>.steps"``.

    Returns:
        The recipe.

    Raises:
        ConfigError: If the file is missing or not a recipe, or a name or value is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {str(path)!r}; give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("stages"), dict):
        raise ConfigError(f"{path} is not a recipe: it needs a mapping `stages`.")
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    stages = {n: _make(StageConfig, s, f"stage {n!r}") for n, s in raw.pop("stages").items()}
    recipe = _make(EmbeddedRecipe, {**raw, "stages": stages}, str(path))
    _check(recipe)
    return recipe


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    first, _, rest = key.partition(".")
    if not rest:
        raw[first] = value
        return
    for place in (raw["stages"], raw):
        if isinstance(place.get(first), dict):
            place[first][rest] = value
            return
    hint = did_you_mean(first, raw["stages"])
    raise ConfigError(f"Override {key!r}: there is no {first!r}.{hint} Stages: {[*raw['stages']]}.")


def _make(cls: type, values: Any, where: str) -> Any:
    allowed = [f.name for f in fields(cls)]
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping with keys among {allowed}.")
    for key in values:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed)
            raise ConfigError(f"{where}: unknown key {key!r}.{hint} Allowed: {', '.join(allowed)}.")
    if cls is StageConfig and "kind" not in values:
        raise ConfigError(f"{where} has no `kind`. Allowed: {', '.join(STAGE_KINDS)}.")
    return cls(**values)


def _check(recipe: EmbeddedRecipe) -> None:
    known: list[str] = []
    for name, stage in recipe.stages.items():
        if stage.kind not in STAGE_KINDS:
            hint = did_you_mean(stage.kind, STAGE_KINDS)
            raise ConfigError(
                f"Stage {name!r}: unknown kind {stage.kind!r}.{hint} "
                f"Allowed: {', '.join(STAGE_KINDS)}."
            )
        for source in stage.start_from:
            if source not in known:
                raise ConfigError(
                    f"Stage {name!r} starts from {source!r}, which is no earlier stage: {known}."
                )
        if stage.steps < 1 or stage.batch < 1:
            raise ConfigError(f"Stage {name!r}: steps and batch must be at least 1.")
        known.append(name)
    for name in recipe.only or []:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"only: there is no stage {name!r}.{hint} Stages: {known}.")
    if recipe.precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision is {recipe.precision!r}; allowed: fp32, bf16.")
    if recipe.attention not in ("eager", "sdpa"):
        raise ConfigError(f"attention is {recipe.attention!r}; allowed: eager, sdpa.")
