# SPDX-License-Identifier: Apache-2.0
"""Operators ``visprune::ragged_decode`` and ``visprune::ragged_decode_quantized``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visprune.kernels.common import requirements
from visprune.kernels.common.autograd import watched
from visprune.kernels.common.precision import uncast

from . import quantize, torch_impl

MAX_HEAD_DIM = 256
BLOCK = torch_impl.BLOCKS[0]
# The arithmetic of the quantiser is the same on every device.
pack_quantized = quantize.quantize
unpack_quantized = quantize.dequantize


def why_not(q: Tensor, dims: Sequence[int], *others: Tensor | None) -> list[str]:
    """Reasons why the Triton kernels cannot run on these inputs; empty if they can."""
    given = [t for t in others if t is not None]
    reasons = requirements.why_not(q, *given, head_dim=max(dims), max_head_dim=MAX_HEAD_DIM)
    wrong = {t.dtype for t in given if t.is_floating_point()} - {*requirements.DTYPES, q.dtype}
    if wrong:
        names = ", ".join(sorted(map(str, wrong)))
        reasons.append(f"{names} is not float32, bfloat16 or float16")
    return reasons


def _impl(backend: str) -> Any:
    """The module that computes: ``torch_impl`` or ``triton_impl``, with the same functions."""
    if backend == "triton":
        from . import triton_impl

        return triton_impl
    return torch_impl


_REST = (
    "Tensor offsets, Tensor? lengths, float scale, Tensor? bias, bool causal, float softcap, "
    "bool with_lse, str backend"
)
# Defined by schema: a call of `torch.library.custom_op` takes as long as a short decode.
torch.library.define(
    "visprune::ragged_decode",
    f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "visprune::ragged_decode_quantized",
    "(Tensor q, Tensor k, Tensor k_scale, Tensor k_zero, Tensor v, Tensor v_scale, Tensor v_zero, "
    f"int[] bits, int[] groups, bool[] per_channel, {_REST}) -> (Tensor out, Tensor lse)",
)
ragged_decode = torch.ops.visprune.ragged_decode.default
ragged_decode_quantized = torch.ops.visprune.ragged_decode_quantized.default


@torch.library.impl("visprune::ragged_decode", ("cpu", "cuda"))
@uncast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    softcap: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``q`` [B, H, R, d], ``k`` [S, d], ``v`` [S, dv] -> [B, H, R, dv], fp32 LSE [B, H, R].

    Without ``with_lse`` the second may be zeros.
    """
    args = (offsets, lengths, scale, bias, causal, softcap, with_lse)
    made: tuple[Tensor, Tensor] = _impl(backend).ragged_decode(q, k, v, *args)
    return made


@torch.library.impl("visprune::ragged_decode_quantized", ("cpu", "cuda"))
@uncast
def _forward_quantized(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    bits: Sequence[int],
    groups: Sequence[int],
    per_channel: Sequence[bool],
    offsets: Tensor,
    lengths: Tensor | None,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    softcap: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The same over codes (``quantize.py``); pairs are (keys, values)."""
    tensors = (q, k, k_scale, k_zero, v, v_scale, v_zero, bits, groups, per_channel)
    args = (offsets, lengths, scale, bias, causal, softcap, with_lse)
    made: tuple[Tensor, Tensor] = _impl(backend).ragged_decode_quantized(*tensors, *args)
    return made


def decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As ``ragged_decode``; on a CPU without the operator where nobody looks at it."""
    *args, backend = rest
    if backend == "torch" and q.device.type == "cpu" and not watched():
        return torch_impl.ragged_decode(q, k, v, *args)
    found: tuple[Tensor, Tensor] = ragged_decode(q, k, v, *rest)
    return found


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("visprune::ragged_decode")
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[1]))
    return out, q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.register_fake("visprune::ragged_decode_quantized")
def _fake_quantized(
    q: Tensor, k: Any, ks: Any, kz: Any, v: Tensor, vs: Any, vz: Any, bits: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[1] * 8 // bits[1]))
    return out, q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _flops(q_shape: Any, slots: int, dims: int, offsets_shape: Any) -> int:
    """Two products for every slot and each row of its key head; all stored slots are counted."""
    batch, heads, rows, _ = q_shape
    segments = offsets_shape[0] - 1
    return int(2 * batch * heads * rows * slots * dims // segments) if segments else 0


@register_flop_formula(torch.ops.visprune.ragged_decode)
def ragged_decode_flops(
    q_shape: Any, k_shape: Any, v_shape: Any, offsets_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """By the storage: lengths are values, and a counter sees shapes."""
    return _flops(q_shape, k_shape[0], k_shape[1] + v_shape[1], offsets_shape)


@register_flop_formula(torch.ops.visprune.ragged_decode_quantized)
def ragged_decode_quantized_flops(
    q_shape: Any, k_shape: Any, ks: Any, kz: Any, v_shape: Any, vs: Any, vz: Any, bits: Any,
    groups: Any, per_channel: Any, offsets_shape: Any, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """The products alone, as over numbers."""
    dims = q_shape[3] + v_shape[1] * 8 // bits[1]
    return _flops(q_shape, k_shape[0], dims, offsets_shape)
