# SPDX-License-Identifier: Apache-2.0
"""Several processes on one recipe: ``torchrun --nproc-per-node N -m visprune.train ...``."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are, as ``torchrun`` set them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join() -> tuple[int, int]:
    """Meet the other processes, if there are any.

    Returns:
        This process's number and how many there are.
    """
    rank, size = rank_and_size()
    if size > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return rank, size


def average_gradients(parameters: Iterable[torch.nn.Parameter], size: int) -> None:
    """Replace each gradient by its mean over all processes, in one message.

    Args:
        parameters: Parameters; those without a gradient are left out, the same in each process.
        size: Number of processes; 1 does nothing.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if size == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    pieces = (flat / size).split([grad.numel() for grad in grads])
    for grad, piece in zip(grads, pieces, strict=True):
        grad.copy_(piece.view_as(grad))
