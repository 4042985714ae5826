# SPDX-License-Identifier: Apache-2.0
"""Where Triton kernels can run: what is asked of the tensors of every operator."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads this when it is imported, so a later change would not reach it either.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(
    first: Tensor, *others: Tensor | None, head_dim: int = 0, max_head_dim: int = 0
) -> list[str]:
    """Reasons why the Triton kernels cannot run on these inputs; empty if they can.

    Args:
        first: the tensor that decides device and dtype.
        others: tensors that must be on its device.
        head_dim: the widest head of the inputs.
        max_head_dim: the widest that the kernels take.
    """
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton is not installed")
    if first.device.type != "cuda" and not INTERPRET:
        reasons.append(f"the tensors are on {first.device.type}, Triton needs a CUDA device")
    if any(t is not None and t.device != first.device for t in others):
        reasons.append("the tensors are on different devices")
    if first.dtype not in DTYPES:
        reasons.append(f"they are {first.dtype}, the kernel takes float32, bfloat16 and float16")
    if head_dim > max_head_dim:
        reasons.append(f"head dim {head_dim} is above {max_head_dim}")
    return reasons
