# SPDX-License-Identifier: Apache-2.0
"""Scores of a tuned model beside those before: means, floors, what came back, paired intervals."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from typing import Any, Protocol

from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, VispruneError
from visprune.eval.metrics.beside import floors
from visprune.eval.models.base import NONE, ModelEntry
from visprune.eval.models.vlm import VLM
from visprune.eval.report.failures import commonest_failure
from visprune.eval.run.runner import run_study
from visprune.eval.stats import PairedDifference, paired_bootstrap
from visprune.eval.study.grid import build_study
from visprune.eval.tasks.base import get_task
from visprune.train.vlm.recipe import TaskSection

__all__ = ["score", "summary"]


class Tested(Protocol):
    """What is read of a recipe: questions to learn from and to score."""

    train: TaskSection
    test: TaskSection


def score(
    vlm: VLM, method: PruningMethod | None, test: TaskSection, *, batch_size: int = 1,
    query_aware: bool = True, dense: bool = True,
) -> dict[str, list[float]]:  # fmt: skip
    """Score of every test question, in order: ``dense`` of all tokens, ``pruned`` of the method.

    Args:
        vlm: The model, with what the method has learned.
        method: Also scored, if given.
        test: The questions.
        batch_size: Questions that are asked together.
        query_aware: Whether the method has seen the question
            (:class:`visprune.eval.study.grid.Study`).
        dense: Also ask with all tokens.

    Raises:
        ConfigError: The task's references are not public, or the method does not act on the model.
        VispruneError: A question could not be asked.
    """
    task = get_task(test.task, **test.options)
    if not task.scored:
        raise ConfigError(
            f"test: the references of {task.name} are not public, so nothing can be scored. Name a "
            f"split with references, or another task."
        )
    study = build_study(
        {
            "models": [ModelEntry(vlm.name)], "tasks": [task], "controls": [NONE] * dense,
            "methods": [] if method is None else [method], "batch_size": batch_size,
            "query_aware": query_aware, "pictures": False, "seeds": [task.seed],
        }
    )  # fmt: skip
    vlm.model.eval()
    with tempfile.TemporaryDirectory(prefix="visprune-train-") as folder:
        results = run_study(study, folder, loader=lambda _: vlm)
        failures = commonest_failure(results)
        if failures is not None:
            raise VispruneError(f"The test questions cannot be scored. {failures.text}")
        cells = results.cells()
        refused = [cell.refused for cell in cells.values() if cell.refused is not None]
        if refused:
            raise ConfigError(f"The test questions cannot be scored. {refused[0]}")
        found: dict[str, dict[str, float]] = {"dense": {}, "pruned": {}}
        for record in results.records():
            arm = "dense" if cells[record.cell].method["method"] == NONE else "pruned"
            assert record.score is not None, "the task is scored, and nothing failed"
            found[arm][record.sample] = record.score
    scores = {}
    for arm, of in found.items():
        if not of:
            continue
        scores[arm] = [of[sample.id] for sample in task.samples()]
        said = method if arm == "pruned" else "all tokens"
        mean = 100 * sum(scores[arm]) / len(of)
        print(f"{said}: {mean:.1f} over {len(of)} questions", flush=True)
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
