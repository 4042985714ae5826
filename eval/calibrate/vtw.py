# SPDX-License-Identifier: Apache-2.0
"""The layer of VTW on one model: from where on the next word does not miss the pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.errors import ConfigError
from visprune.eval.models.base import ModelEntry, Request
from visprune.eval.models.load_vlm import load
from visprune.eval.models.names import EMBEDDED
from visprune.eval.models.vlm import VLM
from visprune.eval.tasks.base import SampleError, Task, get_task
from visprune.machine.find import find_adapter
from visprune.machine.run import prune
from visprune.methods.vtw import VTW

__all__ = ["Withdrawal", "calibrate", "find_layer"]


@dataclass(frozen=True)
class Withdrawal:
    """What dropping all visual tokens on entering a layer does to the next word.

    Attributes:
        divergence: by layer, the mean divergence in nats.
        threshold: how much is taken as none.
        prompts: how many were asked.
    """

    divergence: Mapping[int, float]
    threshold: float
    prompts: int

    @property
    def layer(self) -> int | None:
        """The first layer whose divergence is within the threshold; ``None``: there is none."""
        within = (n for n, value in self.divergence.items() if value <= self.threshold)
        return next(within, None)

    def __str__(self) -> str:
        rows = [f"layer   divergence (nats, mean of {self.prompts} prompts)"]
        rows += [f"{n:5d}   {value:.6f}" for n, value in self.divergence.items()]
        if self.layer is None:
            rows.append(f"no layer stays within {self.threshold:g}: this model looks to the end")
        else:
            rows.append(f"vtw layer={self.layer}: the first within {self.threshold:g}")
        return "\n".join(rows)


def calibrate(
    model: str,
    *,
    task: str | None = None,
    options: Mapping[str, Any] | None = None,
    limit: int = 20,
    threshold: float = 0.003,
    first: int = 5,
    dtype: str = "auto",
    device: str = "auto",
) -> Withdrawal:
    """Load a model, and find its layer on the first questions of a task.

    Args:
        model: as ``visprune check`` takes it: ``embedded``, a folder, or a name on the Hub.
        task: a name of ``visprune tasks``; ``None``: the embedded model's own (the paper takes
            ``scienceqa_img``).
        options: of the task.
        limit: how many questions.
        threshold: see :func:`find_layer`.
        first: the same.
        dtype: of the model.
        device: the same.

    Raises:
        ConfigError: there is no such model or task, a task without prompts, or see
            :func:`find_layer`.
        UnsupportedModel: the model has no adapter.
    """
    if task is None and model != EMBEDDED:
        raise ConfigError(
            "Give a task whose questions the layer is found on, such as --task scienceqa_img "
            "(which the paper takes); `visprune tasks` lists them."
        )
    asked = get_task(task or "embedded", **{"limit": limit, **(options or {})})
    if not asked.generates:
        raise ConfigError(f"{asked.name} wants class numbers and puts no question to a model.")
    vlm = load(ModelEntry(model, dtype, device))
    find_adapter(vlm.model)  # a refusal comes before the first picture is read
    return find_layer(vlm.model, _prompts(vlm, asked), threshold=threshold, first=first)


def _prompts(vlm: VLM, task: Task) -> Iterator[dict[str, Any]]:
    """What the model takes for each sample whose picture can be read."""
    for sample in task.samples():
        try:
            request = Request(sample, task.prompt(sample, vlm.style), sample.image())
        except SampleError:
            continue
        yield vlm.inputs([request], vlm.style)


@torch.inference_mode()
def find_layer(
    model: Any,
    prompts: Iterable[Mapping[str, Any]],
    *,
    threshold: float = 0.003,
    first: int = 5,
    limit: int | None = None,
) -> Withdrawal:
    """Find the layer at which VTW may withdraw the visual tokens (arXiv:2405.05803).

    For every layer from ``first`` on, the divergence of the next word's distribution, with and
    without visual tokens from that layer on: ``sum_w p(w) log(p(w) / q(w))``, ``p`` of the pruned
    and ``q`` of the untouched model, as the official code takes it; the mean over prompts. The
    layer is the first within the threshold, whatever comes behind it. Position ids stay.

    Args:
        model: a vision-language model; it is left as it was.
        prompts: what the model takes, a batch of one or more each; every row is a prompt.
        threshold: 0.003, the paper's for LLaVA-1.5-7B (13B: 0.0005, LLaVA-NeXT: 0.0001).
        first: the first layer that is tried, 5 in the paper.
        limit: batches that are asked; ``None``: all.

    Raises:
        ConfigError: no layer to try, no prompt, a threshold below 0, or the model is pruned.
        UnsupportedModel: the model has no adapter.
    """
    adapter = find_adapter(model)
    last = adapter.spec.num_layers - 1
    if adapter.spec.deepest is not None:
        last = min(last, adapter.spec.deepest)
    if not 0 <= first <= last:
        raise ConfigError(
            f"The first layer to try is {first}; tokens can leave this model at decoder layers "
            f"0 to {last}. Give one of those (--first)."
        )
    if not threshold >= 0.0:
        raise ConfigError(f"A threshold is a divergence of at least 0, got {threshold}.")
    layers = range(first, last + 1)
    keep: dict[str, Any] = {} if adapter.heads_all else {"logits_to_keep": 1}
    total, rows = torch.zeros(len(layers), dtype=torch.float64), 0
    for inputs in itertools.islice(prompts, limit):
        whole = _next_word(model(**inputs, **keep))
        for place, layer in enumerate(layers):
            with prune(model, VTW(layer=layer)):
                pruned = _next_word(model(**inputs, **keep))
            total[place] += (pruned.exp() * (pruned - whole)).sum().cpu()
        rows += len(whole)
    if not rows:
        raise ConfigError("There is no prompt to find the layer on. Give at least one.")
    mean = (total / rows).clamp(min=0.0)  # by rounding, of equal distributions
    return Withdrawal(dict(zip(layers, mean.tolist(), strict=True)), threshold, rows)


def _next_word(output: Any) -> Tensor:
    """Logarithms of the probabilities of each row's next word, ``[B, V]``."""
    logits: Tensor = output.logits[:, -1]
    return logits.double().log_softmax(-1)
