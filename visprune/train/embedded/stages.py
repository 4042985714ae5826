# SPDX-License-Identifier: Apache-2.0
"""What each kind of stage trains, on which batches, with which loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from visprune.eval.tasks.embedded import KINDS, Scene, make_sample
from visprune.train.embedded.data import (
    IGNORE,
    TOKENS,
    PatchLabels,
    QuestionBatch,
    choose_patches,
    dense_batch,
    encode_questions,
    patch_labels,
    to_pixels,
)
from visprune.train.embedded.parts import Parts, answer_logits
from visprune.train.embedded.recipe import StageConfig
from visprune.train.parallel import rank_and_size

Stats = dict[str, tuple[float, int]]
"""(right, total) by name."""

_DECODER = "model.model.language_model."
_TOWER = "model.model.vision_tower."
_PROJECTOR = "model.model.multi_modal_projector."
_VALIDATION = 1_000_000_000  # step number from which validation batches are drawn


class TrainingStage(ABC):
    """One kind of stage.

    Args:
        parts: What is trained.
        config: The stage's settings.
        seed: Seed of its batches; batch number n depends on it and n alone.
        device: Where to compute.
    """

    trains: tuple[str, ...]
    draws = True  # whether pictures must be painted

    def __init__(self, parts: Parts, config: StageConfig, seed: int, device: torch.device) -> None:
        self.parts, self.config, self.seed, self.device = parts, config, seed, device

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that this stage changes, by name."""
        every = self.parts.named_parameters()
        return {name: p for name, p in every if name.startswith(self.trains)}

    def rng(self, step: int) -> np.random.Generator:
        """The random numbers of a step, different in each process."""
        return np.random.default_rng([self.seed, step, rank_and_size()[0]])

    def pictures(self, step: int) -> list[Scene]:
        """The pictures of a step; validation steps take those of the validation split."""
        config, (rank, size) = self.config, rank_and_size()
        first = (self.seed % 1000) * 10_000_000 + (step * size + rank) * config.batch
        split = "train"
        if step >= _VALIDATION:
            split, first = "validation", (step - _VALIDATION) * config.batch
        return [
            make_sample(split, first + i, config.per_kind, draw=self.draws)
            for i in range(config.batch)
        ]

    @abstractmethod
    def loss(self, step: int) -> tuple[torch.Tensor, Stats]:
        """Loss and accuracies of a step's batch."""

    def learning_rates(self) -> Mapping[str, float]:
        """Learning rate by name prefix; the first that fits counts."""
        return {"": self.config.lr}

    @torch.no_grad()
    def validate(self) -> Stats:
        """Accuracies on the validation split's first pictures."""
        total: dict[str, int] = defaultdict(int)
        right: dict[str, float] = defaultdict(float)
        for i in range(max(1, self.config.validate_pictures // self.config.batch)):
            for key, (hit, count) in self.loss(_VALIDATION + i)[1].items():
                right[key] += hit
                total[key] += count
        return {key: (right[key], total[key]) for key in total}


class OracleStage(TrainingStage):
    """The decoder alone, on symbolic visual tokens: sequences are short and nothing is painted."""

    trains = (_DECODER, "oracle.")
    draws = False

    def __init__(self, parts: Parts, config: StageConfig, seed: int, device: torch.device) -> None:
        super().__init__(parts, config, seed, device)
        if config.ramp:  # a checkpoint of this stage, loaded later, replaces it
            parts.oracle.add_ramp(config.ramp, seed)
        if config.signposts:
            parts.oracle.add_signposts(config.signposts, parts.model.get_input_embeddings().weight)

    def trained(self) -> dict[str, nn.Parameter]:
        """Decoder and oracle, or the decoder's layers alone."""
        every = super().trained()
        if self.config.tables:
            return every
        return {n: p for n, p in every.items() if "embed_tokens" not in n and n[:7] != "oracle."}

    def loss(self, step: int) -> tuple[torch.Tensor, Stats]:
        """Answer loss; see :class:`TrainingStage`."""
        config, pictures = self.config, self.pictures(step)
        return symbolic_loss(self.parts, pictures, self.rng(step), config.patches, config.drop)


class DenseStage(TrainingStage):
    """The tower alone, on small windows: which object is in each patch, and where."""

    trains = (_TOWER, "heads.")

    def loss(self, step: int) -> tuple[torch.Tensor, Stats]:
        """Patch loss; see :class:`TrainingStage`."""
        config = self.config
        low, high = config.objects
        pixels, labels = dense_batch(self.rng(step), config.batch, config.side, low, high)
        labels = labels.to(self.device)
        features, cls = self.parts.see(pixels.to(self.device), labels)
        return self.parts.heads(features, cls, labels)


class AlignStage(TrainingStage):
    """Tower and projector learn to produce the oracle's tokens; the decoder is left alone."""

    trains = (_TOWER, _PROJECTOR, "heads.")

    def loss(self, step: int) -> tuple[torch.Tensor, Stats]:
        """Patch loss and distance to the oracle's tokens; see :class:`TrainingStage`."""
        config = self.config
        low, high = config.objects
        pixels, labels = dense_batch(self.rng(step), config.batch, config.side, low, high)
        labels = labels.to(self.device)
        features, cls = self.parts.see(pixels.to(self.device), labels)
        patch_loss, stats = self.parts.heads(features, cls, labels)
        distance = oracle_distance(self.parts, features, labels)
        stats["distance"] = (float(distance.detach()), 1)
        return distance * 4 + patch_loss * config.dense_weight, stats


class JointStage(TrainingStage):
    """The whole model on whole pictures and questions, with the patch losses beside."""

    trains = (_DECODER, _TOWER, _PROJECTOR, "heads.")

    def loss(self, step: int) -> tuple[torch.Tensor, Stats]:
        """Answer loss and patch losses; see :class:`TrainingStage`."""
        rng, pictures, config = self.rng(step), self.pictures(step), self.config
        owners = np.stack([p.patch_owner for p in pictures])
        labels = patch_labels(owners, [p.objects for p in pictures]).to(self.device)
        pixels = to_pixels([p.pixels for p in pictures]).to(self.device)
        features, cls = self.parts.see(pixels)
        visual = self.parts.model.model.multi_modal_projector(features)
        keep = TOKENS if step >= _VALIDATION else config.patches
        index = choose_patches(rng, owners, keep, config.drop).to(self.device)
        visual = visual.gather(1, index[..., None].expand(-1, -1, visual.shape[-1]))
        questions = encode_questions(pictures).to(self.device)
        loss, stats = answer_loss(self.parts, visual, index, questions)
        if config.dense_weight:
            patch_loss, patch_stats = self.parts.heads(features, cls, labels)
            loss = loss + config.dense_weight * patch_loss
            stats |= {f"patch_{key}": value for key, value in patch_stats.items()}
        if config.oracle_batch and step < _VALIDATION:
            loss = loss + self._symbolic(step)
        return loss, stats

    def _symbolic(self, step: int) -> torch.Tensor:
        """Answer loss on symbolic tokens: many more questions for little more time."""
        config, (rank, size) = self.config, rank_and_size()
        first = 500_000_000 + (step * size + rank) * config.oracle_batch
        pictures = [
            make_sample("train", first + i, config.per_kind, draw=False)
            for i in range(config.oracle_batch)
        ]
        return symbolic_loss(self.parts, pictures, self.rng(first), 80, config.drop)[0]

    def learning_rates(self) -> Mapping[str, float]:
        """The decoder has its own rate."""
        slow = self.config.lr_decoder or self.config.lr
        return {_DECODER: slow, "": self.config.lr}


STAGES: dict[str, type[TrainingStage]] = {
    "oracle": OracleStage,
    "dense": DenseStage,
    "align": AlignStage,
    "joint": JointStage,
}


def answer_loss(
    parts: Parts, visual: torch.Tensor, index: torch.Tensor, questions: QuestionBatch
) -> tuple[torch.Tensor, Stats]:
    """Cross entropy of answers (and, lightly, of the end after them), accuracy per kind.

    Args:
        parts: The model.
        visual: Visual tokens ``[B, n, D]``.
        index: Their places ``[B, n]``.
        questions: Questions ``[B, T]``.

    Returns:
        Loss and (right, total) per kind and under ``"all"``.
    """
    logits = answer_logits(parts.model, visual, index, questions)
    each = F.cross_entropy(
        logits.flatten(0, 1), questions.target.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(questions.target)
    asked = questions.kind >= 0
    ends = (questions.target != IGNORE) & ~asked
    loss = each[asked].mean() + 0.05 * each[ends].mean()
    hit = logits.detach().argmax(-1) == questions.target
    stats = {"all": (float(hit[asked].sum()), int(asked.sum()))}
    for number, kind in enumerate(KINDS):
        mine = questions.kind == number
        stats[kind] = (float(hit[mine].sum()), int(mine.sum()))
    return loss, stats


def symbolic_loss(
    parts: Parts, pictures: Sequence[Scene], rng: np.random.Generator, patches: int, drop: float
) -> tuple[torch.Tensor, Stats]:
    """Answer loss on the oracle's tokens, with noise, since a tower's will not be perfect.

    Args:
        parts: The model.
        pictures: What is asked; they need not be painted.
        rng: Source of randomness.
        patches: Visual tokens shown.
        drop: Largest share of object patches hidden.

    Returns:
        As :func:`answer_loss`.
    """
    owners = np.stack([p.patch_owner for p in pictures])
    index = choose_patches(rng, owners, patches, drop)
    table = parts.model.get_input_embeddings().weight
    labels = patch_labels(owners, [p.objects for p in pictures]).gather(index)
    visual = parts.oracle(labels.to(table.device), table)
    noise = torch.from_numpy(rng.standard_normal(visual.shape, dtype=np.float32))
    spread = visual.detach().pow(2).mean().sqrt()
    visual = visual + 0.15 * spread * noise.to(table.device)
    questions = encode_questions(pictures).to(table.device)
    return answer_loss(parts, visual, index.to(table.device), questions)


def oracle_distance(parts: Parts, features: torch.Tensor, labels: PatchLabels) -> torch.Tensor:
    """Mean squared distance of projected features to the oracle's tokens, relative to their size.

    Args:
        parts: The model.
        features: Tower features ``[B, N, D]``.
        labels: Labels ``[B, N]``.

    Returns:
        Scalar; 0 is perfect, 1 is as bad as all zeros. Object patches weigh as in the heads.
    """
    table = parts.model.get_input_embeddings().weight
    with torch.no_grad():
        target = parts.oracle(labels, table).float()
    error = (parts.model.model.multi_modal_projector(features).float() - target).pow(2).mean(-1)
    weight = (labels.color != IGNORE).float() * 4 + 0.5
    return (error * weight).sum() / weight.sum() / target.pow(2).mean()
