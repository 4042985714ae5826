# SPDX-License-Identifier: Apache-2.0
"""The operators in plain operators of PyTorch, for what knows no others: ONNX, other runtimes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from visprune.kernels.attention_rows import op as rows_op
from visprune.kernels.hilo_attention import op as hilo_op
from visprune.kernels.neighborhood_attention import op as na_op
from visprune.kernels.sparse_attention import op as sparse_op


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``: each operator and what stands for it.

    The results are the same; the work is that of dense attention.
    """
    return {**rows_op.PLAIN, **hilo_op.PLAIN, **na_op.PLAIN, **sparse_op.PLAIN}
