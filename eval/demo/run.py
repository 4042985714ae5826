# SPDX-License-Identifier: Apache-2.0
"""`visprune demo`: a study of the embedded model, with a table, a plot and pictures of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from visprune.eval.demo.report import report
from visprune.eval.demo.rows import Measured, build_rows
from visprune.eval.demo.sheet import draw_sheet
from visprune.eval.environment import quiet_loading, set_threads, writable_folder
from visprune.eval.models.base import NONE, Request
from visprune.eval.models.names import EMBEDDED
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.eval.run.progress import Progress
from visprune.eval.run.runner import run_study
from visprune.eval.speed.measure import measure_study
from visprune.eval.study.grid import Study, build_study
from visprune.machine.run import prune

__all__ = ["BUDGETS", "METHODS", "DemoGrid", "run_demo"]

METHODS = ("random", "pool", "todre", "divprune", "fastv")
BUDGETS = (192, 128, 64, 32)
QUESTIONS = 504
_BATCH = 16
_COMPARED = 3  # prompts on which keep_all's logits are held against the untouched model's


@dataclass(frozen=True)
class DemoGrid:
    """What the demo runs.

    Attributes:
        methods: beside the untouched model and keep_all.
        budgets: tokens kept.
        limit: questions.
        prompts: prompts that are timed under each method.
    """

    methods: Sequence[str] = METHODS
    budgets: Sequence[int] = BUDGETS
    limit: int = QUESTIONS
    prompts: int = 20

    def study(self) -> Study:
        """The same as a study."""
        return build_study(
            {
                "name": "demo", "models": [EMBEDDED], "tasks": [EMBEDDED], "limit": self.limit,
                "methods": list(self.methods), "budgets": list(self.budgets),
                "controls": [NONE, "keep_all"], "batch_size": _BATCH,
                "speed": {"rounds": self.prompts, "warmup": 1, "batches": [1], "new_tokens": 2,
                          "prompts": self.prompts},
            }
        )  # fmt: skip


def run_demo(
    out: str | Path,
    limit: int | None = None,
    threads: int | None = None,
    *,
    grid: DemoGrid | None = None,
    model: tuple[Any, Any] | None = None,
) -> list[dict[str, Any]]:
    """Compare methods and budgets on the embedded model; print a table, write files into ``out``.

    ``demo.json`` and ``demo.csv`` (the rows), ``accuracy_flops.png``, ``contact_sheet.png``,
    ``run.json`` (command, hardware, versions, seeds, blind floor, the untouched model's time), and
    in ``study`` the records of every answer, which ``visprune report`` makes a page of. A demo that
    was stopped goes on.

    Args:
        out: folder to write into; made if it is not there.
        limit: questions to ask; ``None``: 504, as many of each kind as pictures allow.
        threads: CPU threads; ``None``: two, or one where there is one.
        grid: other methods and budgets.
        model: another (model, processor) of the embedded model's shape.

    Returns:
        The rows of ``demo.json``.

    Raises:
        ConfigError: ``out`` cannot be written or holds a demo of other methods, a number is out of
            range, or there are no weights.
    """
    folder = writable_folder(out)
    grid = grid or DemoGrid()
    grid = replace(grid, limit=limit) if limit is not None else grid
    before = torch.get_num_threads()
    try:
        set_threads(threads)
        return _run(folder, grid, model or _embedded())
    finally:
        torch.set_num_threads(before)


def _embedded() -> tuple[Any, Any]:
    from visprune.backbones.vlm import embedded

    with quiet_loading():
        return embedded.load()


def _run(folder: Path, grid: DemoGrid, loaded: tuple[Any, Any]) -> list[dict[str, Any]]:
    study, console = grid.study(), Console()
    vlm = VLM(*loaded, name=EMBEDDED, template=PLAIN, style="plain")
    with Progress(console) as bars:
        results = run_study(study, folder / "study", loader=lambda _: vlm, progress=bars)
        measure_study(study, results, loader=lambda _: vlm, progress=bars)
    measured = Measured(results)
    chosen = draw_sheet(folder / "contact_sheet.png", vlm, study, measured)
    rows = build_rows(measured)
    report(console, folder, rows, measured, exact=_keep_all_is_exact(vlm, chosen, study))
    return rows


@torch.inference_mode()
def _keep_all_is_exact(vlm: VLM, chosen: str, study: Study) -> bool:
    """Whether keep_all's logits are the untouched model's to the bit, on a few questions.

    Args:
        vlm: the model.
        chosen: id of a sample that is among them.
        study: the study.
    """
    (task,) = study.tasks
    samples = list(task.samples())
    samples = [s for s in samples if s.id == chosen] + samples[: _COMPARED - 1]
    for sample in samples:
        request = Request(sample, task.prompt(sample, "plain"), sample.image())
        inputs = vlm.inputs([request], "plain")
        whole = vlm.model(**inputs, logits_to_keep=1).logits
        with prune(vlm.model, "keep_all"):
            if not torch.equal(vlm.model(**inputs, logits_to_keep=1).logits, whole):
                return False
    return True
