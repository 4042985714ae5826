# SPDX-License-Identifier: Apache-2.0
"""The demo's contact sheet: one picture as every method leaves it, with the answer then given."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from visprune.core.method import PruningMethod
from visprune.eval.demo.rows import SEED, Measured
from visprune.eval.models.base import Request
from visprune.eval.models.vlm import VLM
from visprune.eval.show.figures import Panel, contact_sheet
from visprune.eval.show.kept import kept_of, paint
from visprune.eval.study.grid import Study
from visprune.machine.run import prune

__all__ = ["draw_sheet", "most_typical"]

_NOTE = (
    "What the model still sees of this picture under each method. A dropped patch lies under a "
    "veil. A pooled cell is one token, the mean of its patches. Below each picture stands the "
    "answer that the model then gives, and whether it is right. Of all questions for a digit, this "
    "is the most typical one: its answers fit the methods' accuracies best."
)


def most_typical(right: Sequence[np.ndarray], eligible: np.ndarray) -> int:
    """Return the question whose outcomes fit the accuracies of the entries best.

    A question picked for a picture by eye, or since methods differ on it, would flatter some of
    them. This one has the largest likelihood if each entry answered at its own accuracy.

    Args:
        right: per entry, which questions it answered, ``[n]`` bool.
        eligible: questions to choose among, ``[n]`` bool.

    Returns:
        The first of the best; the first of all if none is eligible.
    """
    outcomes = np.asarray(right, bool)  # [entries, n]
    if not eligible.any():
        return 0
    share = outcomes[:, eligible].mean(1, keepdims=True).clip(0.01, 0.99)
    likelihood = np.where(outcomes, np.log(share), np.log1p(-share)).sum(0)
    return int(np.where(eligible, likelihood, -np.inf).argmax())


@torch.inference_mode()
def draw_sheet(path: Path, vlm: VLM, study: Study, measured: Measured) -> str:
    """Draw what every method keeps of one picture, and what the model answered then.

    Args:
        path: PNG to write.
        vlm: the model.
        study: what was run.
        measured: what it gave; the sheet shows the question of :func:`most_typical`.

    Returns:
        The sample that is shown.
    """
    labels = measured.rows
    reading = np.asarray([record.kind == "read" for record in measured.records[measured.whole]])
    chosen = most_typical([measured.right(label) for label in labels], reading)
    (task,) = study.tasks
    name = measured.records[measured.whole][chosen].sample
    sample = next(s for s in task.samples() if s.id == name)
    image = sample.image()
    inputs = vlm.inputs([Request(sample, task.prompt(sample, "plain"), image)], "plain")
    panels: dict[str, list[Panel]] = {}
    about: dict[str, str] = {}
    budgets: dict[int, None] = {}
    for variant in study.variants:
        method = variant.at(SEED)
        if variant.label not in labels or not isinstance(method, PruningMethod):
            continue
        with prune(vlm.model, method) as run:
            vlm.model(**inputs, logits_to_keep=1)
        kept, said = kept_of(run.trace), measured.records[variant.label][chosen]
        real = len(kept.index) in (variant.num_keep, len(kept.pos))
        text = f"“{said.text}”" + ("" if real else f" ({len(kept.index)} kept)")
        panel = Panel(paint(image, kept), text, said.score == 1.0)
        panels.setdefault(method.name, []).append(panel)
        about[method.name] = _paper(method)
        if variant.num_keep is not None and variant.label != measured.whole:
            budgets[variant.num_keep] = None
    original = panels.pop(measured.whole)[0]
    contact_sheet(
        Panel(np.asarray(image), original.text, original.right), panels,
        sorted(budgets, reverse=True), path, title=f"“{sample.question}”", note=_NOTE, about=about,
    )  # fmt: skip
    return sample.id


def _paper(method: PruningMethod) -> str:
    """The first line of the method's module: what it does, and the paper."""
    line = (sys.modules[type(method).__module__].__doc__ or "").strip().partition("\n")[0]
    line = line.partition(": ")[2] or line
    return line[:1].upper() + line[1:]
