# SPDX-License-Identifier: Apache-2.0
"""What :mod:`visprune.eval.speed.measure` times: a model under a method, whole and by part."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor

from visprune.backbones.hf.cache import cache_of
from visprune.core.method import PruningMethod
from visprune.eval.models.base import NO_IMAGE, Choice, Request
from visprune.eval.models.vit import Classifier
from visprune.eval.models.vlm import VLM
from visprune.eval.run.jobs import Job
from visprune.eval.speed.latency import Case, synchronize
from visprune.eval.tasks.base import Task
from visprune.machine.find import find_adapter
from visprune.machine.run import Run, prune

__all__ = ["Bench", "Clock", "VLMBench", "ViTBench"]


@dataclass
class Clock:
    """Seconds spent in named parts.

    Attributes:
        device: to wait for.
        seconds: by name of the part.
        run: the method in force, which times itself.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    run: Run | None = None
    _inside: bool = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part; a part within a part belongs to the outer one."""
        if self._inside:
            yield
            return
        self._inside = True
        synchronize(self.device)
        begin = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            self._inside = False

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does the same and is timed; ``generate`` reads its signature."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return run


class _Stamps(LogitsProcessor):
    """Notes when the scores of each new token are there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return scores


def _nothing(*choice: Any) -> None:
    """An observer: a run that is observed times itself."""


class Bench(Protocol):
    """How one kind of model is timed.

    Attributes:
        device: where it runs.
    """

    device: torch.device

    def prepare(self, batch: Sequence[Request], task: Task, *, blind: bool) -> Any:
        """A batch as tensors on the device."""

    def case(self, name: str, job: Job, inputs: Callable[[int], Any], clock: Clock | None) -> Case:
        """One cell as something to time; with a clock, by part."""

    def memory(self, job: Job, batch: list[Request]) -> dict[str, int | None]:
        """``kv_bytes`` and ``peak_bytes``."""


class VLMBench:
    """How a vision-language model is timed."""

    def __init__(self, vlm: VLM, style: str, new_tokens: int) -> None:
        self.vlm, self.style, self.new_tokens = vlm, style, new_tokens
        self.device = next(vlm.model.parameters()).device

    def prepare(self, batch: Sequence[Request], task: Task, *, blind: bool) -> dict[str, Any]:
        """The batch as tensors on the device; words as the task puts them."""
        requests = [
            Request(r.sample, task.prompt(r.sample, self.style), None if blind else r.image)  # type: ignore[arg-type]
            for r in batch
        ]
        return self.vlm.inputs(requests, self.style)

    def case(self, name: str, job: Job, inputs: Callable[[int], Any], clock: Clock | None) -> Case:
        """One cell as something to time; with a clock, its parts alone."""

        def run(turn: int) -> dict[str, float]:
            begin, stamps = time.perf_counter(), _Stamps(self.device)
            self._generate(inputs(turn), [] if clock else [stamps])
            if clock is not None:
                spent = 0.0 if clock.run is None else clock.run.trace.selection_seconds
                seconds = {"vision_ms": 0.0, "selection_ms": spent, **clock.seconds}
                clock.seconds.clear()
                return seconds
            first, last = stamps.times[0], stamps.times[-1]
            steps = len(stamps.times) - 1
            return {"prefill_ms": first - begin, "decode_ms_per_token": (last - first) / steps}

        return Case(name, run, lambda: self._around(job.variant.at(job.cell.seed), clock))

    @contextmanager
    def _around(self, choice: Choice, clock: Clock | None) -> Iterator[None]:
        """Attach the method, and the clock to what it times."""
        if not isinstance(choice, PruningMethod):
            with self._vision(clock):
                yield
            return
        adapter = find_adapter(self.vlm.model)
        if clock is None:
            with Run(adapter, choice):
                yield
            return
        with Run(adapter, choice) as clock.run, self._vision(clock):
            clock.run.observe(_nothing)
            yield
        clock.run = None

    @contextmanager
    def _vision(self, clock: Clock | None) -> Iterator[None]:
        """Time the encoding of pictures on this instance."""
        core: Any = getattr(self.vlm.model, "model", None)
        if clock is None or not hasattr(core, "get_image_features"):
            yield
            return
        before = vars(core).get("get_image_features")
        core.get_image_features = clock.timed("vision_ms", core.get_image_features)
        try:
            yield
        finally:
            del core.get_image_features
            if before is not None:
                core.get_image_features = before

    @torch.inference_mode()
    def _generate(self, inputs: dict[str, Any], processors: list[Any]) -> None:
        count = self.new_tokens
        self.vlm.model.generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1,
            logits_processor=processors,
        )  # fmt: skip

    @torch.inference_mode()
    def memory(self, job: Job, batch: list[Request]) -> dict[str, int | None]:
        """Bytes in the cache after the prefill of one sample; peak bytes of the GPU."""
        choice = job.variant.at(job.cell.seed)
        blind = choice == NO_IMAGE
        with self._around(choice, None):
            one = self.vlm.model(**self.prepare(batch[:1], job.task, blind=blind), logits_to_keep=1)
            layers = cache_of(one).layers
            stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
            del one, layers
            return {"kv_bytes": stored, "peak_bytes": self._peak(batch, job, blind=blind)}

    def _peak(self, batch: list[Request], job: Job, *, blind: bool) -> int | None:
        if self.device.type != "cuda":
            return None
        inputs = self.prepare(batch, job.task, blind=blind)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._generate(inputs, [])
        return torch.cuda.max_memory_allocated(self.device)


class ViTBench:
    """How an image classifier is timed: one forward."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.device = classifier, classifier.device

    def prepare(self, batch: Sequence[Request], task: Task, *, blind: bool) -> torch.Tensor:
        """The pictures, ``[B, 3, H, W]``."""
        pixels = torch.stack([self.classifier.transform(request.image) for request in batch])
        return pixels.to(self.device, self.classifier.dtype)

    def case(self, name: str, job: Job, inputs: Callable[[int], Any], clock: Clock | None) -> Case:
        """One cell as something to time; the forward is its only part."""

        @torch.inference_mode()
        def run(turn: int) -> dict[str, float]:
            pixels, begin = inputs(turn), time.perf_counter()
            self.classifier.logits(pixels)
            synchronize(self.device)
            return {"vision_ms": time.perf_counter() - begin} if clock else {}

        return Case(name, run, lambda: self._around(job.variant.at(job.cell.seed)))

    @contextmanager
    def _around(self, choice: Choice) -> Iterator[None]:
        if isinstance(choice, PruningMethod):
            with prune(self.classifier.tower, choice):
                yield
        else:
            yield

    @torch.inference_mode()
    def memory(self, job: Job, batch: list[Request]) -> dict[str, int | None]:
        """Peak bytes of the GPU; there is no cache."""
        if self.device.type != "cuda":
            return {"peak_bytes": None}
        pixels = self.prepare(batch, job.task, blind=False)
        with self._around(job.variant.at(job.cell.seed)):
            torch.cuda.reset_peak_memory_stats(self.device)
            self.classifier.logits(pixels)
        return {"peak_bytes": torch.cuda.max_memory_allocated(self.device)}
