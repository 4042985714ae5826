# SPDX-License-Identifier: Apache-2.0
"""Latency by part: encoding, selecting, the first token, each further token; nothing left out.

Every method runs once in each round, neighbours taking turns, on the same prompts, with the same
attention kernel as the untouched model (visprune never changes it) and the same number of new
tokens. ``total_ms``, ``prefill_ms`` (time to the first token, encoding and selection included) and
``decode_ms_per_token`` come from undisturbed runs; ``vision_ms`` and ``selection_ms`` from runs of
their own, since the waiting that tells parts of a GPU's work apart slows the whole. What a method
reads off the encoder while that runs is in ``vision_ms``. The processor's work is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from visprune.errors import ConfigError
from visprune.eval.environment import describe
from visprune.eval.models.base import NO_IMAGE, NONE, EvalModel, Request
from visprune.eval.models.load import load_model
from visprune.eval.models.vit import Classifier
from visprune.eval.models.vlm import VLM
from visprune.eval.records.folder import ResultsFolder
from visprune.eval.run.jobs import Job, jobs_of
from visprune.eval.run.progress import Silent
from visprune.eval.speed.latency import Case, interleaved
from visprune.eval.speed.parts import Bench, Clock, ViTBench, VLMBench
from visprune.eval.study.grid import SpeedPlan, Study
from visprune.eval.tasks.base import SampleError, Task

__all__ = ["measure_jobs", "measure_study"]

_PARTS = ":parts"


def measure_study(
    study: Study,
    folder: ResultsFolder,
    *,
    loader: Callable[[Any], EvalModel] = load_model,
    progress: Silent | None = None,
) -> None:
    """Measure every cell of a study that has no latency yet, on the first seed's questions."""
    plan = study.speed or SpeedPlan()
    environment = folder.add_environment(describe())
    known = folder.speed()
    for spec in study.models:
        model = loader(spec)
        jobs = [job for job in jobs_of(study, model) if job.cell.refused is None]
        for task in dict.fromkeys(job.task for job in jobs if job.cell.seed == study.seeds[0]):
            group = [job for job in jobs if job.task == task]
            if all(job.cell.id in known for job in group):
                continue
            measured = measure_jobs(model, group, plan, progress=progress or Silent())
            for cell, values in measured.items():
                folder.add_speed(cell, {**values, "env": environment})


def measure_jobs(
    model: EvalModel, jobs: Sequence[Job], plan: SpeedPlan, *, progress: Silent | None = None
) -> dict[str, dict[str, Any]]:
    """Time the cells of one task side by side.

    Args:
        model: the model.
        jobs: cells of one task and seed.
        plan: rounds, batches, new tokens.
        progress: where to show it.

    Returns:
        By cell: ``{"rounds", "batch": {"1": {"total_ms": {"median", "q1", "q3"}, ...}}, "kv_bytes",
        "peak_bytes", "attention", "device", "threads", "baseline_cell"}``. ``kv_bytes`` are those
        stored after the prefill at batch 1, read off the cache; ``peak_bytes`` of GPU memory at the
        first batch size, ``None`` on the CPU.
    """
    shown = progress or Silent()
    bench = _bench(model, plan, jobs[0].cell.prompt_style)
    whole = [job.cell.id for job in jobs if job.variant.choice == NONE]
    found: dict[str, dict[str, Any]] = {
        job.cell.id: {
            "rounds": plan.rounds, "new_tokens": plan.new_tokens, "batch": {}, "kv_bytes": None,
            "peak_bytes": None, "attention": job.cell.model.get("attention"),
            "device": str(bench.device), "threads": torch.get_num_threads(),
            "baseline_cell": whole[0] if whole else None,
        }
        for job in jobs
    }  # fmt: skip
    for size in plan.batches:
        batches = _batches(jobs[0].task, size, plan.prompts)
        shown.cell(f"latency, batch {size}", 2 * len(jobs) * (plan.rounds + plan.warmup), 0)
        for job, values in zip(jobs, _rounds(bench, jobs, batches, plan, shown), strict=True):
            found[job.cell.id]["batch"][str(size)] = values
    for job in jobs:
        found[job.cell.id].update(bench.memory(job, _batches(job.task, plan.batches[0], 1)[0]))
    return found


def _bench(model: EvalModel, plan: SpeedPlan, style: str) -> Bench:
    if isinstance(model, VLM):
        return VLMBench(model, style, plan.new_tokens)
    if isinstance(model, Classifier):
        return ViTBench(model)
    raise ConfigError(f"{type(model).__name__} is no model that can be timed.")


def _batches(task: Task, size: int, count: int) -> list[list[Request]]:
    """Up to ``count`` batches of readable samples, evenly spread."""
    samples = task.samples()
    places = np.linspace(0, len(samples) - 1, min(count * size, len(samples))).round().astype(int)
    requests = []
    for place in dict.fromkeys(places.tolist()):
        sample = samples[place]
        try:
            requests.append(Request(sample, task.prompt(sample, "plain"), sample.image()))
        except SampleError:
            continue
    while requests and len(requests) < size:
        requests = requests * 2
    return [requests[i : i + size] for i in range(0, len(requests) - size + 1, size)][:count]


def _rounds(
    bench: Bench, jobs: Sequence[Job], batches: list[list[Request]],
    plan: SpeedPlan, shown: Silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time all cells at one batch size; quartiles of every part, in milliseconds."""
    # Tensors of every prompt before the first round: only the model is timed.
    blind = {job.variant.choice == NO_IMAGE for job in jobs}
    prepared = {
        b: [bench.prepare(batch, jobs[0].task, blind=b) for batch in batches] for b in blind
    }

    def inputs(job: Job) -> Callable[[int], Any]:
        ready = prepared[job.variant.choice == NO_IMAGE]
        return lambda turn: ready[turn % len(ready)]

    cases: list[Case] = []
    parts: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        for suffix in ("", _PARTS):
            clock = Clock(bench.device) if suffix else None
            name = job.cell.id + suffix
            cases.append(bench.case(name, job, inputs(job), clock))
            parts[name] = {}

    def after(case: Case, turn: int, seconds: dict[str, float]) -> None:
        shown.step()
        if turn >= 0:
            for part, value in seconds.items():
                parts[case.name].setdefault(part, []).append(value)

    timings = interleaved(
        cases, rounds=plan.rounds, warmup=plan.warmup, device=bench.device, after=after
    )
    found = []
    for job in jobs:
        plain = {"total_ms": timings.seconds[job.cell.id], **parts[job.cell.id]}
        whole = {**plain, **parts[job.cell.id + _PARTS]}
        found.append({part: _quartiles(values) for part, values in whole.items()})
    return found


def _quartiles(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(np.asarray(seconds) * 1e3, [0.25, 0.5, 0.75])
    return {"median": float(middle), "q1": float(low), "q3": float(high)}
