# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the Triton kernels share: the product of a tile, and a launch that fits the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

_PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def precision(dtype: torch.dtype) -> str:
    """How ``dot`` multiplies inputs of this type, fp32 as PyTorch is told to.

    ``torch.set_float32_matmul_precision``: ``"highest"``, the default, is fp32 without tensor
    cores; ``"high"`` three products on them, which lose the last two or three bits; ``"medium"``
    is TF32. ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` counts as ``"high"``. The
    setting is PyTorch's own, so a model has one for its matrix products and these.
    """
    if dtype != torch.float32:
        return "tf32"  # half types have one way
    try:
        return _PRECISION[torch.get_float32_matmul_precision()]
    except RuntimeError:  # the newer setting was used, and PyTorch does not translate it
        return "tf32x3" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def warps(products: str) -> int:
    """Warps of a tile; without tensor cores whole operands lie in registers and want more."""
    return 8 if products == "ieee" else 4


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in fp32; ``PRECISION`` from :func:`precision`."""
    return tl.dot(a, b, input_precision=PRECISION)


_FITTING: dict[Any, int] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch with the most pipeline stages, up to ``num_stages``, that shared memory holds.

    A data-centre card has more than twice the shared memory of others; nothing has run when
    Triton finds that a kernel does not fit.

    Raises:
        OutOfResources: It does not fit with one stage.
    """
    stages = options.pop("num_stages", 3)
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    key = (kernel, device, stages, *options.items())
    # Triton launches on the current device, which is not that of every layer of a spread model.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for count in range(_FITTING.get(key, stages), 0, -1):
            try:
                kernel[grid](*args, num_stages=count, **options)
            except OutOfResources:
                if count == 1:
                    raise
                continue
            _FITTING[key] = count
            return
