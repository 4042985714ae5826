# SPDX-License-Identifier: Apache-2.0
"""Ask the embedded questions: every picture is encoded once, under every method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visprune.backbones.vlm.embedded import PROMPT
from visprune.cost.cost import Cost
from visprune.errors import ConfigError
from visprune.eval.tasks.embedded import Picture, Question
from visprune.machine.run import Run
from visprune.machine.sharing import EncodedImages, encode_images

__all__ = ["Answers", "Prompt", "QuestionSet", "batch_inputs"]


@dataclass(frozen=True)
class Prompt:
    """One question, as token ids.

    Attributes:
        question: the question.
        picture: number of its picture in the set.
        ids: the whole prompt, image placeholders included.
        answer: id of the right answer.
    """

    question: Question
    picture: int
    ids: tuple[int, ...]
    answer: int


@dataclass
class Answers:
    """What a model answered under one method, in the order of the prompts.

    Attributes:
        predicted: token id given to each question, ``[n]`` int64.
        right: whether it is the right one, ``[n]`` bool.
        tokens_mean: visual tokens, mean over layers and questions.
        cost: of all questions together, each as if its picture were encoded for it alone.
    """

    predicted: np.ndarray
    right: np.ndarray
    tokens_mean: float = float("nan")
    cost: Cost = field(default_factory=lambda: Cost(samples=0))


class QuestionSet:
    """Pictures and questions, ready to be put to one model.

    Args:
        model: the embedded model, or another of its shape.
        processor: its processor.
        pictures: pictures with their questions.
        batch_size: questions per forward; those of one batch have the same length, so nothing is
            padded.
    """

    def __init__(
        self, model: Any, processor: Any, pictures: Sequence[Picture], *, batch_size: int = 16
    ) -> None:
        self.model, self.processor, self.pictures = model, processor, list(pictures)
        self.device = next(model.parameters()).device
        self.prompts = [
            make_prompt(processor, model, question, number)
            for number, picture in enumerate(self.pictures)
            for question in picture.questions
        ]
        self.batches = _batches(self.prompts, batch_size)
        self._pixels: Tensor | None = None
        self._encoded: EncodedImages | None = None

    def encode(self, advance: Callable[[int], None] = lambda count: None, chunk: int = 16) -> None:
        """Run the vision tower over all pictures; ``advance`` is told how many are done.

        Before transformers 5.18 models take no encoded pictures: then only pixels are prepared.
        """
        images = [picture.image for picture in self.pictures]
        self._pixels = self.processor.image_processor(images=images, return_tensors="pt")[
            "pixel_values"
        ].to(self.device)
        shared = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        features: list[Tensor] = []
        for start in range(0, len(images), chunk):
            part = self._pixels[start : start + chunk]
            if shared:
                features += encode_images(self.model, pixel_values=part).features
            advance(len(part))
        self._encoded = EncodedImages(features) if shared else None

    def visual_inputs(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What a forward takes for these pictures.

        Raises:
            ConfigError: :meth:`encode` was not called.
        """
        if self._pixels is None:
            raise ConfigError("Call encode() before asking questions.")
        if self._encoded is not None:
            return {"mm_encoder_outputs": self._encoded.select(numbers)}
        return {"pixel_values": self._pixels[list(numbers)]}

    def single(self, number: int) -> dict[str, Any]:
        """Inputs of one prompt with its own pixels: what a user's call would be, batch 1."""
        if self._pixels is None:
            raise ConfigError("Call encode() before asking questions.")
        prompt = self.prompts[number]
        pixels = self._pixels[prompt.picture : prompt.picture + 1]
        return {**batch_inputs([prompt], self.device), "pixel_values": pixels}

    @torch.inference_mode()
    def ask(self, run: Run | None, advance: Callable[[int], None] = lambda count: None) -> Answers:
        """Put all questions; the answer is the likeliest token after the prompt.

        Args:
            run: the method in force, for its trace and cost; ``None``: an untouched model.
            advance: told how many questions are answered.
        """
        predicted = np.full(len(self.prompts), -1, np.int64)
        tokens, costs = 0.0, Cost(samples=0)
        for batch in self.batches:
            prompts = [self.prompts[i] for i in batch]
            logits = self.model(
                **batch_inputs(prompts, self.device),
                **self.visual_inputs([prompt.picture for prompt in prompts]),
                logits_to_keep=1,
            ).logits
            predicted[batch] = logits[:, -1].argmax(-1).cpu().numpy()
            if run is not None:
                tokens += sum(run.trace.mean_tokens)
                costs += run.cost()
            advance(len(batch))
        right = predicted == np.asarray([prompt.answer for prompt in self.prompts])
        if run is None:
            return Answers(predicted, right)
        return Answers(predicted, right, tokens / len(self.prompts), costs)


def make_prompt(processor: Any, model: Any, question: Question, picture: int) -> Prompt:
    """Write a question into the model's prompt, with one placeholder per visual token."""
    tokenizer = processor.tokenizer
    placeholders = processor.image_token * model.config.image_seq_length
    text = PROMPT.format(question=question.text).replace(processor.image_token, placeholders)
    answer = tokenizer.convert_tokens_to_ids(question.answer)
    return Prompt(question, picture, tuple(tokenizer(text)["input_ids"]), answer)


def batch_inputs(prompts: Sequence[Prompt], device: torch.device | str) -> dict[str, Tensor]:
    """Ids and mask of prompts of one length, ``[B, S]``."""
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.ids), []).append(number)
    return [
        group[start : start + size]
        for group in by_length.values()
        for start in range(0, len(group), size)
    ]
