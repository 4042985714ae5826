# SPDX-License-Identifier: Apache-2.0
"""Score questions that come after their picture's cache was cut: read once, ask many times."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch

from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError
from visprune.eval.models.base import Request
from visprune.eval.models.vlm import VLM
from visprune.eval.tasks.base import Sample, Task
from visprune.machine.find import find_adapter
from visprune.machine.run import prune

__all__ = ["score_after"]

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@torch.no_grad()
def score_after(vlm: VLM, method: PruningMethod | None, task: Task) -> list[float]:
    """Score of every sample, whose question the method has not seen.

    The prompt up to the end of its picture is read, and its cache is cut; every question about that
    picture goes on from a copy of it.

    Args:
        vlm: The model.
        method: One that acts at the cache; ``None``: all stays.
        task: The questions.

    Raises:
        ConfigError: Prompts about one picture do not begin alike.
    """
    groups: dict[str, list[int]] = {}
    samples = task.samples()
    for number, sample in enumerate(samples):
        groups.setdefault(sample.cluster or sample.id, []).append(number)
    scores = [0.0] * len(samples)
    with nullcontext() if method is None else prune(vlm.model, method):
        for members in groups.values():
            for number, text in zip(
                members, _answers(vlm, task, [samples[n] for n in members]), strict=True
            ):
                sample = samples[number]
                scores[number] = task.score(sample, task.parse(text, sample))
    said = "all slots" if method is None else method
    mean = 100 * sum(scores) / len(scores)
    print(f"{said}: {mean:.1f} over {len(scores)} questions", flush=True)
    return scores


def _answers(vlm: VLM, task: Task, samples: list[Sample]) -> list[str]:
    """Answers to questions about one picture."""
    image, found, cache = samples[0].image(), [], None
    end, prefix = 0, torch.zeros(0)
    generation = vlm.generation(task, {})
    token = find_adapter(vlm.model).token_id("image")
    for sample in samples:
        request = Request(sample, task.prompt(sample, vlm.style), image)
        inputs = vlm.inputs([request], vlm.style)
        ids = inputs["input_ids"]
        if cache is None:
            end = int((ids[0] == token).nonzero()[-1]) + 1
            prefix = ids[:, :end]
            first = {k: v[:, :end] if k in _TEXT else v for k, v in inputs.items()}
            cache = cache_of(vlm.model(**first, use_cache=True))
        if not torch.equal(ids[:, :end], prefix):
            raise ConfigError(
                f"{task.name}: prompts about one picture begin differently before it ends, so one "
                f"cache cannot serve them. Put the picture before the question."
            )
        text: dict[str, Any] = {k: v for k, v in inputs.items() if k in _TEXT}
        text[CACHE_ARGUMENT] = copy.deepcopy(cache)
        out = vlm.model.generate(**text, **generation)
        new = out[:, ids.shape[1] :]
        found += vlm.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return found
