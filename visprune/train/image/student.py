# SPDX-License-Identifier: Apache-2.0
"""The student of a run: model, token reduction, moving average, teacher and their loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.macs import counted_macs
from visprune.backbones.vit import Sparsifiner, stage_parameters
from visprune.backbones.vit.sparsifiner_cost import measured_macs
from visprune.backbones.vit.sparsifiner_training import (
    reconstruction_loss,
    teacher_outputs,
)
from visprune.errors import ConfigError
from visprune.machine.saved import save_pretrained
from visprune.train.image.batches import ImageData
from visprune.train.image.learner import build_model, data_config, make_ema, make_teacher
from visprune.train.image.losses import (
    hard_loss,
    logit_distillation,
    ratio_loss,
    token_distillation,
)
from visprune.train.image.recipe import ImageRecipe
from visprune.train.image.reduction import Reduction
from visprune.train.image.sources import open_pictures

__all__ = ["Student"]


class Student:
    """Everything that a step changes, apart from the optimiser.

    Args:
        recipe: The recipe.
        device: Where it computes.

    Attributes:
        data: Its pictures.
        model: The model; what its method learns is a part of it.
        reduction: Its token reduction, or None.

    Raises:
        ConfigError: The recipe's parts do not fit each other.
    """

    def __init__(self, recipe: ImageRecipe, device: torch.device) -> None:
        self.recipe = recipe
        train = open_pictures(recipe.data, "train")
        classes = len(train.classes)
        self.model: Any = build_model(recipe.model, classes, recipe.seed).to(device)
        self.data = ImageData(recipe, data_config(self.model), train)
        self.ema = make_ema(self.model, recipe)  # before any hook: it copies the model
        self.reduction = self.ema_reduction = None
        if recipe.prune is not None:
            self.reduction = Reduction(self.model, recipe.prune)
            if self.ema is not None:
                self.ema_reduction = self.reduction.copy_to(self.ema.module)
        self.teacher: Any = make_teacher(recipe, classes, device)
        self.reconstructs = False
        if recipe.sparse is not None:
            self._check_sparse()
        if recipe.distill is not None and recipe.distill.token:
            self._check_tokens()

    def _check_sparse(self) -> None:
        """Refuse Sparsifiner's stages for another model, or without a teacher."""
        if not isinstance(self.model, Sparsifiner):
            raise ConfigError(
                f"The section sparse is for Sparsifiner models (model.name: sparsifiner_deit_tiny "
                f"...); got {self.recipe.model.name}."
            )
        if self.teacher is None or not hasattr(self.teacher, "blocks"):
            raise ConfigError(
                "Sparsifiner's predictors learn from a dense ViT; name it by distill.teacher."
            )

    def _check_tokens(self) -> None:
        """Refuse token distillation between models whose tokens cannot be compared."""
        widths = [getattr(model, "num_features", None) for model in (self.model, self.teacher)]
        prefixes = [getattr(m, "num_prefix_tokens", None) for m in (self.model, self.teacher)]
        if widths[0] != widths[1] or None in prefixes:
            raise ConfigError(
                f"distill.token compares patch tokens; the student's have {widths[0]} features, "
                f"the teacher's {widths[1]}"
                f"{', and not both are sequences of tokens' if None in prefixes else ''}. "
                f"Set distill.token to 0, or take a teacher of the same width."
            )

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that get gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def predictors(self) -> list[nn.Parameter]:
        """Parameters of the modules that the method adds to the model and trains."""
        learned = self.reduction.learned if self.reduction is not None else None
        return [] if learned is None else list(learned.parameters())

    def set_epoch(self, epoch: float) -> None:
        """Prepare for a training step at a point of time."""
        self.model.train()
        if self.reduction is not None:
            self.reduction.at(epoch)
        if self.recipe.sparse is not None:
            self.reconstructs = epoch < self.recipe.sparse.recon_epochs
            stage_parameters(self.model, "reconstruct" if self.reconstructs else "classify")

    @property
    def fixed_rate(self) -> float | None:
        """The learning rate of this step, where it is not the schedule's."""
        return self.recipe.sparse.recon_lr if self.recipe.sparse and self.reconstructs else None

    def loss(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and the loss of a micro-batch.

        Args:
            images: ``[B, 3, H, W]``.
            target: ``[B, classes]``.
        """
        if self.reconstructs:
            return self._reconstruction(images)
        distill = self.recipe.distill
        with_tokens = distill is not None and distill.token > 0
        logits, tokens, kept = _forward(self.model, images, with_tokens)
        loss = hard_loss(logits, target)
        if distill is not None:
            loss = loss * distill.hard_weight
            with torch.no_grad():
                their_logits, their_tokens, _ = _forward(self.teacher, images, with_tokens)
            if distill.logit:
                soft = logit_distillation(logits, their_logits, distill.temperature)
                loss = loss + soft * distill.logit
            if tokens is not None and their_tokens is not None:
                loss = loss + self._token_loss(tokens, their_tokens, kept) * distill.token
        if self.reduction is not None and self.reduction.learned is not None:
            run = self.reduction.run
            weight = self.recipe.prune.ratio_weight if self.recipe.prune is not None else 0.0
            loss = loss + ratio_loss(run.decisions, run.ratios) * weight
        return logits, loss

    def _reconstruction(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and how far predicted attention is from the teacher's."""
        taught = teacher_outputs(self.teacher, images, attention=True)
        output = self.model.forward_train(images, reconstruct=True)
        weight = self.recipe.sparse.recon_weight if self.recipe.sparse is not None else 0.0
        loss = reconstruction_loss(output.predicted, taught.attention) / len(images)
        return output.logits, loss * weight

    def _token_loss(self, ours: Tensor, theirs: Tensor, kept: Tensor | None) -> Tensor:
        """Distance to the teacher's tokens where the student still has its own."""
        if self.reduction is not None:
            index, there = self.reduction.survivors()
        elif kept is not None:
            index, there = kept, None
        else:
            return token_distillation(ours, theirs)
        theirs = theirs.gather(1, index[..., None].expand(-1, -1, theirs.shape[-1]))
        return token_distillation(ours, theirs, there)

    def after_step(self, step: int) -> None:
        """Follow an update of the weights."""
        if self.ema is not None:
            self.ema.update(self.model, step)

    def state_line(self) -> dict[str, Any]:
        """What a line of the log should say beside the loss."""
        if self.reduction is None:
            return {"stage": "reconstruct"} if self.reconstructs else {}
        line: dict[str, Any] = {}
        ratio = getattr(self.reduction.run.method, "keep_ratio", None)
        if ratio is not None:
            line["keep_ratio"] = round(ratio, 4)
        if self.reduction.learned is not None:
            line["kept"] = [
                round(float(d.detach().mean()), 4) for d in self.reduction.run.decisions
            ]
        return line

    def evaluated(self) -> list[tuple[str, nn.Module]]:
        """Models to validate, by name, reduced as the finished model will be."""
        for reduction in (self.reduction, self.ema_reduction):
            if reduction is not None:
                reduction.at_the_end()
        found: list[tuple[str, nn.Module]] = [("model", self.model.eval())]
        if self.ema is not None:
            found.append(("ema", self.ema.module.eval()))
        return found

    def macs(self) -> int:
        """Multiply-adds of one picture under the finished model; see :func:`count_macs`."""
        if self.reduction is not None:
            self.reduction.at_the_end()
        if isinstance(self.model, Sparsifiner) and self.reduction is None:
            loader = self.data.val_loader(_COUNTED, 0, 1)
            images = next(batch.images for batch in loader if len(batch.labels))
            return measured_macs(self.model.eval(), images.to(next(self.model.parameters()).device))
        size = data_config(self.model)["input_size"]
        return count_macs(self.model.eval(), self.reduction.run if self.reduction else None, size)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """State dicts of a checkpoint."""
        state = {"model": self.model.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        return state

    def load(self, parts: Mapping[str, dict[str, Tensor]]) -> None:
        """Take up the state of a checkpoint."""
        self.model.load_state_dict(parts["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])

    def save(self, folder: Path) -> None:
        """Write the result, the moving average where there is one, with the method beside it."""
        model, reduction = self.model, self.reduction
        if self.ema is not None:
            model, reduction = self.ema.module, self.ema_reduction
        if reduction is not None:
            reduction.at_the_end()
        args = self.recipe.model.args
        names = self.data.classes  # timm keeps them beside the weights, and `visprune eval` asks
        cfg = {**model.pretrained_cfg, "num_classes": len(names), "label_names": list(names)}
        model.pretrained_cfg = cfg
        save_pretrained(reduction.run if reduction else model, folder, model_args=args)


_COUNTED = 8  # pictures, where the number of operations depends on them


def _forward(
    model: Any, images: Tensor, with_tokens: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits; if asked for the last layer's patch tokens ``[B, N, D]``, and their places.

    Places ``[B, N]`` are None where all are there, or a reduction knows them.
    """
    if not with_tokens:
        return model(images), None, None
    if isinstance(model, Sparsifiner):
        out = model.forward_train(images)
        return out.logits, out.tokens, out.kept
    features = model.forward_features(images)
    return model.forward_head(features), features[:, model.num_prefix_tokens :], None


def count_macs(model: Any, run: Any, size: tuple[int, int, int]) -> int:
    """Multiply-adds of one picture.

    Args:
        model: The model in evaluation mode.
        run: The method in force on it, or None: then every matrix product, convolution and
            attention is counted.
        size: Channels, height, width.
    """
    if run is not None:
        cost = run.cost()
        return cost.macs // cost.samples
    return counted_macs(model, size)
