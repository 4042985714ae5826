# SPDX-License-Identifier: Apache-2.0
"""Train the scorers of a method at the cache: which slots the text behind a picture looks at."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visprune.catalog import get_method
from visprune.core.cache import CacheSeen, Eviction, LearnedScore
from visprune.core.method import ModelSpec
from visprune.errors import ConfigError
from visprune.eval.environment import describe
from visprune.eval.models.base import ModelEntry
from visprune.eval.models.load_vlm import load
from visprune.eval.models.vlm import VLM
from visprune.eval.tasks.base import get_task
from visprune.machine.find import find_adapter
from visprune.machine.run import prune
from visprune.machine.saved import save_pretrained
from visprune.methods.learned import Learned
from visprune.train.sections import build_section
from visprune.train.vlm.questions import Collator, Questions
from visprune.train.vlm.recipe import MethodSection, TaskSection
from visprune.train.vlm.scores import score, summary

__all__ = ["ScorerRecipe", "train"]


@dataclass
class ScorerRecipe:
    """A whole run; the model itself stays as it is.

    Attributes:
        model: ``embedded``, a folder, or a name on the Hub.
        prune: The method with its budget: ``learned``.
        train: Prompts to learn from; answers are not needed.
        test: Questions to score before and after.
        steps: Of the optimizer (Adam, its rate falls to zero along a cosine).
        batch: Prompts a step.
        lr: Its rate at first.
        task: ``cache_scorer``.
        seed: Of the new networks and of the order of the prompts.
        dtype: Of the model.
        device: ``auto``, or a torch device.
        threads: CPU threads, or None for torch's choice.
    """

    model: str
    prune: MethodSection
    train: TaskSection
    test: TaskSection
    steps: int = 200
    batch: int = 4
    lr: float = 3e-3
    task: str = "cache_scorer"
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class _Taught(LearnedScore):
    """Scores as the method does, and notes how far that is from what the prompt looks at.

    Attributes:
        losses: of every layer of every sample.
    """

    losses: list[Tensor] = field(default_factory=list, compare=False)

    def read(self, seen: CacheSeen) -> Tensor:
        """The score; its divergence from the attention of the text behind the picture."""
        with torch.enable_grad():
            scored = super().read(seen)
            if bool(seen.free.any()):
                looked = seen.grouped(seen.rows(seen.behind()).mean(1))[:, seen.free].float()
                target = looked / looked.sum(1, keepdim=True).clamp_min(1e-12)
                said = scored[:, seen.free].log_softmax(1)
                self.losses.append(nn.functional.kl_div(said, target, reduction="batchmean"))
        return scored.detach()


@dataclass(frozen=True, kw_only=True)
class _Teaching(Learned):
    """``learned`` with a score that is taught."""

    score: _Taught = field(default_factory=_Taught, compare=False)

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Its own parts, but for that."""
        return replace(super().eviction(spec), score=self.score)


def train(
    raw: Mapping[str, Any], out: str | Path, resume: bool = False, where: str = "the recipe"
) -> dict[str, Any]:
    """Train the networks of ``learned`` on one model, whose weights stay as they are.

    The networks see keys and values alone, and learn the share of the attention that the text
    behind a picture gives to each of its slots: the mean over that text and over the query heads of
    a key head, the divergence of the two distributions as the loss. Scored on the same test
    questions, none of which a cache has seen when it is cut (``query_aware=False`` of
    :class:`visprune.eval.study.grid.Study`): all slots, new networks, trained networks, with paired
    intervals. ``OUT/weights`` is the model with method and networks
    (:func:`visprune.load_pretrained`, ``visprune eval``), ``OUT/result.json`` the numbers.

    Args:
        raw: Content of the recipe's YAML, overrides applied.
        out: Folder to write into.
        resume: Is refused: a run takes minutes, and keeps no checkpoints.
        where: The recipe's file, for messages.

    Returns:
        What ``result.json`` holds.

    Raises:
        ConfigError: The recipe cannot be used.
    """
    recipe: ScorerRecipe = build_section(ScorerRecipe, raw, where)
    _check(recipe, resume, where)
    method = get_method(recipe.prune.method, **recipe.prune.args)
    if type(method) is not Learned:
        raise ConfigError(f"{where}: prune.method is {recipe.prune.method!r}; use 'learned'.")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    questions = Questions(get_task(recipe.train.task, **recipe.train.options))
    get_task(recipe.test.task, **recipe.test.options)  # refused before anything is loaded
    Path(out).mkdir(parents=True, exist_ok=True)
    vlm = load(ModelEntry(recipe.model, dtype=recipe.dtype, device=recipe.device))
    torch.manual_seed(recipe.seed)
    made = method.build_learned(find_adapter(vlm.model).spec)
    vlm.learned = made.state_dict()
    scores = score(vlm, method, recipe.test, query_aware=False)
    taught = replace(method, learned=made)
    begin = time.monotonic()
    losses = _fit(vlm, taught, questions, recipe)
    seconds = time.monotonic() - begin
    vlm.learned = made.state_dict()
    after = score(vlm, method, recipe.test, query_aware=False, dense=False)
    scores |= {"dense_tuned": scores["dense"], "pruned_tuned": after["pruned"]}
    asked = {"style": vlm.style, "template": vlm.template}
    with prune(vlm.model, taught) as run:
        weights = save_pretrained(run, Path(out) / "weights", processor=vlm.processor, asked=asked)
    result = {**summary(scores, recipe), "losses": losses, "train_seconds": round(seconds, 1)}
    result |= {"weights": str(weights), "environment": describe(), "recipe": asdict(recipe)}
    text = json.dumps(result, indent=1) + "\n"
    (Path(out) / "result.json").write_text(text, encoding="utf-8")
    return result


def _check(recipe: ScorerRecipe, resume: bool, where: str) -> None:
    if resume:
        raise ConfigError(f"{where}: a run of task cache_scorer keeps no checkpoints; start anew.")
    if min(recipe.steps, recipe.batch) < 1 or not recipe.lr > 0:
        raise ConfigError(
            f"{where}: steps and batch must be at least 1, and lr above 0; got {recipe.steps}, "
            f"{recipe.batch}, {recipe.lr}."
        )


def _fit(vlm: VLM, method: Learned, questions: Questions, recipe: ScorerRecipe) -> list[float]:
    """Train the networks in place; returns the mean loss of every tenth of the steps."""
    networks = method.learned
    for module in networks.modules():
        if hasattr(module, "checked"):
            module.checked = True  # that they are new is known
    teaching = _Teaching(**{**vars(method)})
    collator, draw = Collator(vlm, questions), random.Random(recipe.seed)
    noted: list[float] = []
    extra = {} if find_adapter(vlm.model).heads_all else {"logits_to_keep": 1}
    with prune(vlm.model, teaching):
        networks.requires_grad_(True)
        optimizer = torch.optim.Adam(networks.parameters(), lr=recipe.lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        for step in range(recipe.steps):
            numbers = [draw.randrange(len(questions)) for _ in range(recipe.batch)]
            requests = [collator.request(questions.samples[n]) for n in numbers]
            with torch.no_grad():
                vlm.model(**vlm.inputs(requests, vlm.style), use_cache=True, **extra)
            loss = torch.stack(teaching.score.losses).mean()
            teaching.score.losses.clear()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            noted.append(float(loss.detach()))
            if step % 20 == 0:
                print(f"step {step}: loss {noted[-1]:.4f}", flush=True)
    networks.requires_grad_(False)
    size = -(-len(noted) // 10)
    parts = [noted[n : n + size] for n in range(0, len(noted), size)]
    return [round(sum(part) / len(part), 5) for part in parts]
