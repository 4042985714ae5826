# SPDX-License-Identifier: Apache-2.0
"""Questions with answers as training batches of a vision-language model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from visprune.errors import ConfigError
from visprune.eval.models.base import Request
from visprune.eval.models.vlm import VLM
from visprune.eval.tasks.base import Sample, Task
from visprune.machine.sharing import encode_images

__all__ = ["Collator", "EncodedQuestions", "GroupedQuestions", "Questions"]

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
IGNORE = -100


class Questions(Dataset[int]):
    """Samples by number; the collator makes the inputs.

    Args:
        task: Where they come from.

    Raises:
        ConfigError: A sample has no reference answer, so nothing can be learned from it.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.samples: Sequence[Sample] = task.samples()
        for sample in self.samples:
            if not sample.answers:
                raise ConfigError(f"Sample {sample.id} of {task.name} has no answer to learn.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> int:
        return number


class Collator:
    """Prompts, answers behind them, labels on the answers alone.

    Args:
        vlm: The model and its processor.
        questions: The samples.
    """

    def __init__(self, vlm: VLM, questions: Questions) -> None:
        self.vlm, self.questions = vlm, questions
        self.dataset: Dataset[Any] = questions
        self.questions_per_item = 1.0

    def request(self, sample: Sample) -> Request:
        """A sample as it is put to the model, now and when it is scored."""
        prompt = self.questions.task.prompt(sample, self.vlm.style)
        return Request(sample, prompt, sample.image())

    def answer(self, sample: Sample) -> list[int]:
        """Ids of the first reference answer and of the end after it."""
        tokenizer = self.vlm.processor.tokenizer
        ids = tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """The model's arguments, ``labels`` among them; prompts are padded on the left."""
        samples = [self.questions.samples[number] for number in numbers]
        requests = [self.request(sample) for sample in samples]
        return self._answered(self.vlm.inputs(requests, self.vlm.style), samples)

    def _answered(self, inputs: dict[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
        """The inputs of some prompts with the answers behind them."""
        answers = [self.answer(sample) for sample in samples]
        text = with_answers(inputs["input_ids"], inputs["attention_mask"], answers)
        extra = text["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                text[key] = torch.nn.functional.pad(inputs[key], (0, extra))
        return {**inputs, **text}


class EncodedQuestions(Collator):
    """The same with every picture encoded once, before training.

    A batch names its pictures by ``pictures``; :meth:`visual` has what the model takes for them.

    Args:
        vlm: The model and its processor.
        questions: The samples.
    """

    def __init__(self, vlm: VLM, questions: Questions) -> None:
        super().__init__(vlm, questions)
        self.prompts: list[list[int]] = [[] for _ in questions.samples]
        self.picture = [0] * len(questions.samples)
        self.features: list[Tensor] = []
        groups: dict[str, list[int]] = {}
        for number, sample in enumerate(questions.samples):
            groups.setdefault(sample.cluster or sample.id, []).append(number)
        for members in groups.values():
            self._encode(members)

    def _encode(self, members: list[int]) -> None:
        """Encode the one picture of some questions, and write their prompts."""
        first = self.request(self.questions.samples[members[0]])
        requests = [
            Request(s, self.questions.task.prompt(s, self.vlm.style), first.image)
            for s in (self.questions.samples[i] for i in members)
        ]
        batch = self.vlm.inputs(requests, self.vlm.style)
        for number, ids, mask in zip(
            members, batch["input_ids"], batch["attention_mask"], strict=True
        ):
            self.prompts[number] = ids[mask.bool()].tolist()
            self.picture[number] = len(self.features)
        single = self.vlm.inputs([first], self.vlm.style)
        pixels = {key: value for key, value in single.items() if key not in _TEXT}
        self.features += encode_images(self.vlm.model, **pixels).features

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """Text of the batch and ``pictures`` ``[B]``."""
        pad = self.vlm.processor.tokenizer.pad_token_id or 0
        longest = max(len(self.prompts[i]) for i in numbers)
        ids = torch.full((len(numbers), longest), pad)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(numbers):
            prompt = torch.tensor(self.prompts[number])
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        answers = [self.answer(self.questions.samples[i]) for i in numbers]
        pictures = torch.tensor([self.picture[i] for i in numbers])
        return {**with_answers(ids, mask, answers), "pictures": pictures}


class GroupedQuestions(Collator):
    """Several questions about one picture together; the picture is in the batch once.

    The items of :attr:`dataset` are groups of questions. A batch has ``pixels``, what the encoder
    takes for the pictures of its groups, and ``pictures`` ``[B]``, which of them each question is
    about.

    Args:
        vlm: The model and its processor.
        questions: The samples.
        most: Questions per group at most; groups of one picture differ by one at most.
        seed: Of the grouping.
    """

    def __init__(self, vlm: VLM, questions: Questions, most: int, seed: int) -> None:
        super().__init__(vlm, questions)
        self.dataset = Groups(questions, most, seed)
        self.questions_per_item = len(questions) / len(self.dataset)

    def __call__(self, groups: list[Any]) -> dict[str, Any]:
        """The model's arguments, with ``pixels`` and ``pictures`` in place of the pictures."""
        samples, requests, firsts = [], [], []
        for group in groups:
            chosen = [self.questions.samples[number] for number in group]
            first = self.request(chosen[0])
            prompts = [self.questions.task.prompt(sample, self.vlm.style) for sample in chosen]
            requests += [Request(s, p, first.image) for s, p in zip(chosen, prompts, strict=True)]
            samples += chosen
            firsts.append(first)
        text = self.vlm.inputs(requests, self.vlm.style)
        single = self.vlm.inputs(firsts, self.vlm.style)
        numbers = [place for place, group in enumerate(groups) for _ in group]
        return {
            **self._answered({k: v for k, v in text.items() if k in _TEXT}, samples),
            "pixels": {key: value for key, value in single.items() if key not in _TEXT},
            "pictures": torch.tensor(numbers),
        }


class Groups(Dataset[tuple[int, ...]]):
    """Numbers of questions about one picture, up to ``most`` at a time, shuffled by the seed."""

    def __init__(self, questions: Questions, most: int, seed: int) -> None:
        by_picture: dict[str, list[int]] = {}
        for number, sample in enumerate(questions.samples):
            by_picture.setdefault(sample.cluster or sample.id, []).append(number)
        draw = random.Random(seed)
        self.groups: list[tuple[int, ...]] = []
        for numbers in by_picture.values():
            draw.shuffle(numbers)
            parts = -(-len(numbers) // most)
            self.groups += [tuple(numbers[part::parts]) for part in range(parts)]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[int, ...]:
        return self.groups[number]


def with_answers(ids: Tensor, mask: Tensor, answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Put answers behind prompts.

    Args:
        ids: Prompts ``[B, S]``, padded on the left.
        mask: Their mask ``[B, S]``.
        answers: Ids of each answer.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` ``[B, S + longest answer]``; padding behind
        an answer is masked, labels are -100 outside answers.
    """
    longest = max(len(answer) for answer in answers)
    tail = torch.zeros(len(answers), longest, dtype=ids.dtype)
    there = torch.zeros_like(tail)
    labels = torch.full_like(tail, IGNORE)
    for row, answer in enumerate(answers):
        values = torch.tensor(answer, dtype=ids.dtype)
        tail[row, : len(answer)] = values
        labels[row, : len(answer)] = values
        there[row, : len(answer)] = 1
    tail, there, labels = (t.to(ids.device) for t in (tail, there, labels))
    return {
        "input_ids": torch.cat([ids, tail], 1),
        "attention_mask": torch.cat([mask, there.to(mask.dtype)], 1),
        "labels": torch.cat([torch.full_like(ids, IGNORE), labels], 1),
    }
