# SPDX-License-Identifier: Apache-2.0
"""Scores of a tuned model beside those before: means, floors, what came back, paired intervals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from visprune.core.method import PruningMethod
from visprune.eval.metrics.beside import floors
from visprune.eval.models.base import Request
from visprune.eval.models.vlm import VLM
from visprune.eval.stats import PairedDifference, paired_bootstrap
from visprune.eval.tasks.base import get_task
from visprune.train.vlm.recipe import TaskSection, VLMRecipe

__all__ = ["score", "summary"]


class Tested(Protocol):
    """What is read of a recipe: questions to learn from and to score."""

    train: TaskSection
    test: TaskSection


def score(vlm: VLM, choice: PruningMethod | str, recipe: VLMRecipe) -> list[float]:
    """Score of every test question, in order.

    Args:
        vlm: The model.
        choice: A method, or :data:`visprune.eval.models.base.NONE` for all tokens.
        recipe: Names the questions.
    """
    task = get_task(recipe.test.task, **recipe.test.options)
    samples, scores = task.samples(), []
    vlm.model.eval()
    generation = vlm.generation(task, {})
    with vlm.answering(choice, task, vlm.style, generation) as answer:
        for start in range(0, len(samples), recipe.score_batch):
            part = [samples[i] for i in range(start, min(start + recipe.score_batch, len(samples)))]
            requests = [Request(s, task.prompt(s, vlm.style), s.image()) for s in part]
            for sample, output in zip(part, answer(requests), strict=True):
                scores.append(task.score(sample, task.parse(output.text, sample)))
    mean = 100 * sum(scores) / len(scores)
    said = choice if isinstance(choice, PruningMethod) else "all tokens"
    print(f"{said}: {mean:.1f} over {len(scores)} questions", flush=True)
    return scores


def summary(scores: dict[str, list[float]], recipe: Tested) -> dict[str, Any]:
    """Means, floors, what training changed, and the share of the loss that came back.

    Args:
        scores: Of each test question: ``dense``, ``dense_tuned``, and with a method ``pruned``,
            ``pruned_tuned``.
        recipe: Names the questions.
    """
    task = get_task(recipe.test.task, **recipe.test.options)
    samples = task.samples()
    clusters = [sample.cluster or sample.id for sample in samples]
    fit = get_task(recipe.train.task, **recipe.train.options).samples()

    def change(after: str, before: str) -> dict[str, float]:
        return _percent(paired_bootstrap(scores[after], scores[before], clusters))

    means = {name: 100 * sum(values) / len(values) for name, values in scores.items()}
    result: dict[str, Any] = {"score": means, "test_questions": len(samples)}
    floor = floors(task, samples, fit)
    if floor is not None:  # what needs no picture, learned from the training questions
        result["floors"] = {"majority": floor.majority, "question_prefix": floor.prior}
    result["dense_gain"] = change("dense_tuned", "dense")
    if "pruned" not in scores:
        return result
    result["gain"] = change("pruned_tuned", "pruned")
    result["left_to_dense"] = change("pruned_tuned", "dense")
    lost = means["dense"] - means["pruned"]
    back = (means["pruned_tuned"] - means["pruned"]) / lost if lost > 0 else None
    return {**result, "lost": lost, "recovered_share": back}


def _percent(change: PairedDifference) -> dict[str, float]:
    return {key: 100 * value for key, value in asdict(change).items()}
