# SPDX-License-Identifier: Apache-2.0
"""The two training stages of Sparsifiner (arXiv 2303.13755), with a dense teacher.

Stage ``"reconstruct"``: the predictors alone learn to reproduce the teacher's attention; nothing is
masked. Stage ``"classify"``: the backbone alone learns under the predicted mask, from labels, the
teacher's logits and its last patch tokens. ``visprune train`` runs both; its losses and defaults
are those of lim142857/Sparsifiner at 9a11e26 (``src/losses.py``, ``src/main.py``,
``sparsifiner_default_config.yaml``: 5 and 45 epochs, learning rates 3e-4 to 2e-4 and 8e-5 to 2e-6
by a cosine, batch 1344, weight decay 0.05).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visprune.backbones.vit.sparsifiner import Sparsifiner
from visprune.errors import ConfigError

SparsifinerStage = Literal["reconstruct", "classify"]


@dataclass
class TeacherOutput:
    """What a dense ViT teaches.

    Attributes:
        logits: [B, classes].
        tokens: normalised patch tokens [B, N, C].
        attention: per layer, probabilities [B, H, N + prefix, N + prefix]; empty if not asked for.
    """

    logits: Tensor
    tokens: Tensor
    attention: list[Tensor]


def teacher_outputs(teacher: Any, images: Tensor, attention: bool) -> TeacherOutput:
    """Run a timm ``VisionTransformer`` without gradient, keeping its attention if asked to.

    Args:
        teacher: the dense model, in eval mode.
        images: [B, 3, H, W].
        attention: whether to compute each layer's probabilities.
    """
    found: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(attention_probabilities(module, args[0]))

    blocks = teacher.blocks if attention else []
    handles = [b.attn.register_forward_pre_hook(keep, with_kwargs=True) for b in blocks]
    try:
        with torch.no_grad():
            features = teacher.forward_features(images)
            logits = teacher.forward_head(features)
    finally:
        for handle in handles:
            handle.remove()
    return TeacherOutput(logits, features[:, teacher.num_prefix_tokens :], found)


def attention_probabilities(attn: Any, x: Tensor) -> Tensor:
    """Softmaxed scores [B, H, N, N] of a timm ``Attention`` for its input ``x`` [B, N, C]."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    return ((q * attn.scale) @ k.transpose(-1, -2)).softmax(-1)


def reconstruction_loss(predicted: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """Squared error to the teacher's attention, summed in a layer, averaged over layers.

    Summed over the batch too, as in the official code: it grows with the batch.

    Args:
        predicted: per layer [B, H, N - prefix, N].
        attention: per layer [B, H, N, N].
    """
    if len(predicted) != len(attention):
        raise ConfigError(f"Student and teacher must be equally deep; the student gave "
                          f"{len(predicted)} layers, the teacher {len(attention)}.")  # fmt: skip
    total = torch.zeros((), device=predicted[0].device)
    for guess, truth in zip(predicted, attention, strict=True):
        truth = truth[:, :, -guess.shape[2] :]
        if guess.shape != truth.shape:
            raise ConfigError(
                f"Student and teacher must have the same heads and tokens; predicted attention is "
                f"{list(guess.shape)}, the teacher's {list(truth.shape)}."
            )
        total = total + F.mse_loss(guess.float(), truth.float(), reduction="sum")
    return total / len(predicted)


def stage_parameters(student: Sparsifiner, stage: SparsifinerStage) -> list[nn.Parameter]:
    """Set ``requires_grad`` for a stage and return what it trains.

    Reconstruction trains the predictors, classification the rest, as the official code does by
    its two optimisers. With ``mask_gradient="straight_through"`` classification trains both.

    Call it before ``DistributedDataParallel`` wraps the student: what the other stage trains gets
    no gradient at all, and DDP waits for a gradient of everything that requires one.
    """
    check_stage(stage)
    rule = student.predictors[0].sparsity
    both = stage == "classify" and rule.mask_gradient == "straight_through"
    for name, parameter in student.named_parameters():
        of_predictor = ".mask_predictor." in name
        parameter.requires_grad_(both or of_predictor == (stage == "reconstruct"))
    return [p for p in student.parameters() if p.requires_grad]


def check_stage(stage: str) -> None:
    """Raise ``ConfigError`` unless ``stage`` is one of the two."""
    if stage not in ("reconstruct", "classify"):
        raise ConfigError(f"stage must be 'reconstruct' or 'classify'; got {stage!r}.")
