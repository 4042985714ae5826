# SPDX-License-Identifier: Apache-2.0
"""A model as an ONNX program."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from visprune.errors import ConfigError
from visprune.ops.plain import decompositions

_MOST = 1 << 16  # pictures of a batch; a bound is part of the form of a dynamic size


def export(
    model: nn.Module,
    images: Tensor,
    path: str | PathLike[str] | None = None,
    *,
    dynamic_batch: bool = True,
    **options: Any,
) -> Any:
    """Write a vision transformer, pruned or not, as an ONNX file.

    Tokens leave in the file as they do in the model: the graph is shorter layer by layer, for the
    size of the images given. Attention over some of the keys (neighborhood, HiLo's windows,
    Sparsifiner) becomes dense attention under a mask: the same result, not the same work.

    Args:
        model: in eval mode; ``visprune.prune`` may be in force.
        images: [B, 3, H, W], an example; with ``dynamic_batch`` at least 2 of them.
        path: the file; None: only the program is returned.
        dynamic_batch: the file takes any number of images, else B.
        options: of ``torch.onnx.export``, such as ``opset_version`` and ``input_names``.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        ConfigError: onnxscript is not installed, the model is in training mode, the batch is too
            small, or an operator of ours has no form in ONNX.
    """
    _check(model, images, dynamic_batch)
    free = {0: torch.export.Dim("images", max=_MOST)}
    shapes = (free,) if dynamic_batch else None
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        program = program.run_decompositions(decompositions())
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    left = {name for name in called if name.startswith("visprune.")}
    if left:
        raise ConfigError(f"ONNX has no form of {', '.join(sorted(left))}, which this model uses.")
    table = {**translations(), **options.pop("custom_translation_table", {})}
    return torch.onnx.export(
        program, f=path, dynamo=True, custom_translation_table=table, verbose=False, **options
    )


def translations() -> dict[Any, Callable[..., Any]]:
    """For ``custom_translation_table`` of ``torch.onnx.export``: sorting by TopK over all.

    TopK of ONNX puts the lower index first among equal values, so it is a stable sort.

    Raises:
        ConfigError: onnxscript is not installed.
    """
    _check_installed()
    from onnxscript import opset18

    op: Any = opset18

    def sort(x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: sort}


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Export to ONNX needs {' and '.join(missing)}, not installed here: "
            "pip install 'visprune[onnx]'."
        )


def _check(model: nn.Module, images: Tensor, dynamic_batch: bool) -> None:
    _check_installed()
    if model.training:
        raise ConfigError("An ONNX file is for inference: call model.eval() before export.")
    if not isinstance(images, Tensor) or images.ndim != 4:
        given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(f"images must be one tensor [B, 3, H, W]; got {given}.")
    if dynamic_batch and len(images) < 2:
        raise ConfigError(
            "With dynamic_batch the example holds at least 2 images (a size of 1 is taken for a "
            f"constant); got {len(images)}. Give 2, or dynamic_batch=False."
        )
