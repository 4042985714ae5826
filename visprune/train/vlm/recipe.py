# SPDX-License-Identifier: Apache-2.0
"""Recipes that fine-tune a vision-language model, pruned or whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visprune.errors import ConfigError
from visprune.train.sections import build_section

__all__ = ["LoraSection", "MethodSection", "TaskSection", "VLMRecipe", "VocabularySection", "read"]


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
class VocabularySection:
    """New words for a tokenizer that has one token per word, such as the embedded model's.

    Attributes:
        min_count: How often a word must occur in the training prompts and answers to get a token.
    """

    min_count: int = 1


@dataclass
class VLMRecipe:
    """A whole run.

    Attributes:
        model: ``embedded``, a folder, or a name on the Hub.
        train: Questions to learn from.
        test: Questions to score before and after.
        prune: The method; None learns with all tokens, the control.
        lora: The adapter; None trains the model's own weights (``task: vlm_finetune``).
        freeze: Regular expressions of the parameters that stay as they are, without an adapter.
        vocabulary: New words for the tokenizer, without an adapter.
        questions_per_picture: Up to that many questions about one picture enter a batch together,
            and the vision tower runs once for them; ``per_device_train_batch_size`` then counts
            pictures. Needs transformers 5.18.
        trainer: Arguments of ``transformers.TrainingArguments``.
        task: ``vlm_lora`` or ``vlm_finetune``.
        seed: Seed of what is new in the model, of the order and of the grouping.
        dtype: Of the model: ``float32``, ``bfloat16``, ``float16``.
        device: ``auto``, or a torch device.
        threads: CPU threads, or None for torch's choice.
        encode_once: Run the vision tower once per picture, before training, and keep its output in
            memory. For runs that leave the tower alone; needs transformers 5.18.
        score_batch: Questions scored at once.
    """

    model: str
    train: TaskSection
    test: TaskSection
    prune: MethodSection | None = None
    lora: LoraSection | None = None
    freeze: list[str] = field(default_factory=list)
    vocabulary: VocabularySection | None = None
    questions_per_picture: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)
    task: str = "vlm_lora"
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    encode_once: bool = False
    score_batch: int = 16


def read(raw: Mapping[str, Any], where: str) -> VLMRecipe:
    """Build a recipe from what YAML gave.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not allowed.
    """
    recipe: VLMRecipe = build_section(VLMRecipe, raw, where)
    taken = {"output_dir", "seed", "remove_unused_columns"} & set(recipe.trainer)
    if taken:
        raise ConfigError(f"{where}: trainer.{min(taken)} is set by the run itself.")
    if recipe.task == "vlm_lora":
        recipe.lora = recipe.lora or LoraSection()
        if recipe.freeze or recipe.vocabulary:
            raise ConfigError(
                f"{where}: freeze and vocabulary belong to task: vlm_finetune, which trains the "
                f"model's own weights; an adapter leaves them all alone."
            )
    elif recipe.lora is not None:
        raise ConfigError(f"{where}: the section lora belongs to task: vlm_lora.")
    lora_rank = 1 if recipe.lora is None else recipe.lora.r
    if min(lora_rank, recipe.score_batch, recipe.questions_per_picture) < 1:
        raise ConfigError(
            f"{where}: lora.r, score_batch and questions_per_picture must be at least 1."
        )
    if recipe.vocabulary is not None and recipe.vocabulary.min_count < 1:
        raise ConfigError(f"{where}: vocabulary.min_count must be at least 1.")
    if recipe.encode_once and recipe.questions_per_picture > 1:
        raise ConfigError(
            f"{where}: with encode_once no picture is encoded during training; leave "
            f"questions_per_picture at 1."
        )
    _check_patterns(recipe.freeze, f"{where}: freeze")
    return recipe


def _check_patterns(patterns: list[Any], where: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{where}: {pattern!r} is no regular expression: {error}.") from error
