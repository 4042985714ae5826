# SPDX-License-Identifier: Apache-2.0
"""Losses: labels, teacher, kept ratio."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["hard_loss", "logit_distillation", "ratio_loss", "token_distillation"]


def hard_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with soft targets.

    Args:
        logits: ``[B, classes]``.
        target: ``[B, classes]``, rows sum to one.
    """
    return -(target * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened class probabilities, mean over the batch.

    DynamicViT (arXiv:2106.02034) and Sparsifiner (arXiv:2303.13755) write KL(student || teacher);
    their code calls ``F.kl_div(log p_student, log p_teacher, log_target=True)``, which is
    KL(teacher || student), the usual one. This follows the code.

    Args:
        student: ``[B, classes]``.
        teacher: ``[B, classes]``.
        temperature: Both are divided by it; the loss is multiplied by its square
            (arXiv:1503.02531), so that gradients keep their size.
    """
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


def token_distillation(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of patch tokens at the places that the student still has.

    Args:
        student: ``[B, N, D]``.
        teacher: ``[B, N, D]``.
        mask: ``[B, N]``, weight of each place; None: all.
    """
    error = (student.float() - teacher.float()).pow(2).mean(-1)
    if mask is None:
        return error.mean()
    mask = mask.to(error.dtype)
    return (error * mask).sum() / mask.sum().clamp_min(1e-6)


def ratio_loss(decisions: list[Tensor], targets: list[float]) -> Tensor:
    """How far a learned predictor is from the ratio it should keep (DynamicViT, eq. 15).

    Args:
        decisions: Of each stage, which tokens it keeps ``[B, N]`` (0 or 1, with gradient).
        targets: The share of the first stage's tokens to keep after each stage.

    Returns:
        Mean over stages and pictures of the squared difference.
    """
    each = [(d.mean(1) - t).pow(2).mean() for d, t in zip(decisions, targets, strict=True)]
    return torch.stack(each).mean()
