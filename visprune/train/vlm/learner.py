# SPDX-License-Identifier: Apache-2.0
"""What of a vision-language model is trained: an adapter, or its own weights; and new words."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from tokenizers.models import WordLevel

from visprune.errors import ConfigError
from visprune.eval.models.vlm import VLM
from visprune.train.vlm.questions import Questions
from visprune.train.vlm.recipe import LoraSection, VLMRecipe

__all__ = ["add_words", "prepared", "refuse_trained_tower"]


def prepared(vlm: VLM, questions: Questions, recipe: VLMRecipe) -> Any:
    """The model as it is trained: with an adapter around it, or with its own weights open.

    Args:
        vlm: The model; new words enter its tokenizer and its embeddings.
        questions: What it will learn.
        recipe: The recipe.

    Raises:
        ConfigError: The adapter, the patterns or the vocabulary do not fit the model.
    """
    torch.manual_seed(recipe.seed)
    if recipe.lora is not None:
        return _with_adapter(vlm.model, recipe.lora)
    if recipe.vocabulary is not None:
        add_words(vlm, questions, recipe.vocabulary.min_count)
    _open(vlm.model, recipe.freeze)
    return vlm.model


def _with_adapter(model: Any, section: LoraSection) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("Adapters need `pip install peft`.") from error
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # no layer of that name
        raise ConfigError(f"lora.target_modules: {error}") from error


def _open(model: Any, freeze: list[str]) -> None:
    """Let every parameter learn but those whose names a pattern finds."""
    unused = set(freeze)
    for name, parameter in model.named_parameters():
        hits = {pattern for pattern in freeze if re.search(pattern, name)}
        unused -= hits
        parameter.requires_grad_(not hits)
    if unused:
        raise ConfigError(
            f"freeze: {min(unused)!r} finds no parameter of {type(model).__name__}; the names are "
            f"those of model.named_parameters()."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("freeze: these patterns leave nothing to train.")


def add_words(vlm: VLM, questions: Questions, min_count: int) -> list[str]:
    """Give a token to every new word of the prompts and answers.

    Args:
        vlm: A model whose tokenizer has one token per word.
        questions: Where the words come from.
        min_count: How often a word must occur.

    Returns:
        The new words, the most frequent first.

    Raises:
        ConfigError: The tokenizer makes words of pieces, so no word is new to it.
    """
    tokenizer = vlm.processor.tokenizer
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or not isinstance(core.model, WordLevel):
        raise ConfigError(
            f"vocabulary: {type(tokenizer).__name__} of {vlm.name} writes any word in pieces; only "
            f"a tokenizer with one token per word needs new ones. Leave the section out."
        )
    known = core.get_vocab(with_added_tokens=True)
    found: Counter[str] = Counter()
    for sample in questions.samples:
        for text in (questions.task.prompt(sample, vlm.style), *sample.answers[:1]):
            found.update(word for word, _ in _split(core, text))
    new = [w for w, count in found.most_common() if count >= min_count and w not in known]
    if new:
        words = {**core.get_vocab(with_added_tokens=False)}
        words |= {word: len(known) + place for place, word in enumerate(new)}
        core.model = WordLevel(words, unk_token=tokenizer.unk_token)
        vlm.model.resize_token_embeddings(len(known) + len(new), mean_resizing=False)
    return new


def _split(core: Any, text: str) -> list[tuple[str, tuple[int, int]]]:
    """Words of a text as the tokenizer sees them."""
    normal = text if core.normalizer is None else core.normalizer.normalize_str(text)
    found: list[tuple[str, tuple[int, int]]] = core.pre_tokenizer.pre_tokenize_str(normal)
    return found


def refuse_trained_tower(model: Any) -> None:
    """Pictures that were encoded before training would not follow a tower that changes.

    Raises:
        ConfigError: Something before the decoder is trained.
    """
    vision = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "language_model" not in name and "lm_head" not in name
    ]
    if vision:
        raise ConfigError(
            f"encode_once: {vision[0]} is trained, so pictures cannot be encoded once. Set "
            f"encode_once to false, or train the decoder alone (lora.target_modules, or freeze: "
            f"[vision_tower, projector])."
        )
