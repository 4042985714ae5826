# SPDX-License-Identifier: Apache-2.0
"""Recipes that fine-tune a pruned vision-language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visprune.errors import ConfigError
from visprune.train.sections import build_section

__all__ = ["LoraSection", "MethodSection", "Recipe", "TaskSection", "read"]


@dataclass
class MethodSection:
    """The method under which the model learns.

    Attributes:
        method: A name of ``visprune methods``.
        args: Its parameters, such as ``num_keep``.
    """

    method: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class TaskSection:
    """Questions of one task of ``visprune tasks``; the first reference answer is learned.

    Attributes:
        task: Its name.
        options: Its options, such as ``split`` and ``limit``.
    """

    task: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoraSection:
    """The adapter (``peft.LoraConfig``).

    Attributes:
        r: Rank.
        alpha: Scale; the adapter's product is multiplied by ``alpha / r``.
        dropout: Of its input.
        target_modules: Names or a regular expression of the layers that get one.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = (
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )


@dataclass
class Recipe:
    """A whole run.

    Attributes:
        model: ``embedded``, a folder, or a name on the Hub.
        train: Questions to learn from.
        test: Questions to score before and after.
        prune: The method; None learns with all tokens, the control.
        lora: The adapter.
        trainer: Arguments of ``transformers.TrainingArguments``.
        task: ``vlm_lora``.
        seed: Seed of the adapter and of the order.
        dtype: Of the model: ``float32``, ``bfloat16``, ``float16``.
        device: ``auto``, or a torch device.
        threads: CPU threads, or None for torch's choice.
        encode_once: Run the vision tower once per picture, before training, and keep its output in
            memory. For adapters that leave the tower alone; needs transformers 5.18.
        score_batch: Questions scored at once.
    """

    model: str
    train: TaskSection
    test: TaskSection
    prune: MethodSection | None = None
    lora: LoraSection = field(default_factory=LoraSection)
    trainer: dict[str, Any] = field(default_factory=dict)
    task: str = "vlm_lora"
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    encode_once: bool = False
    score_batch: int = 16


def read(raw: Mapping[str, Any], where: str) -> Recipe:
    """Build a recipe from what YAML gave.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not allowed.
    """
    recipe: Recipe = build_section(Recipe, raw, where)
    if recipe.lora.r < 1 or recipe.score_batch < 1:
        raise ConfigError(f"{where}: lora.r and score_batch must be at least 1.")
    taken = {"output_dir", "seed", "remove_unused_columns"} & set(recipe.trainer)
    if taken:
        raise ConfigError(f"{where}: trainer.{min(taken)} is set by the run itself.")
    return recipe
