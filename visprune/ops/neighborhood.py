# SPDX-License-Identifier: Apache-2.0
"""Neighborhood attention, fused and unfused (see ``visprune.ops``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor

from visprune.errors import ConfigError
from visprune.kernels.neighborhood_attention import op as na_op
from visprune.ops.check import choose, flag_per_axis, floating, per_axis, shape

Ints = int | Sequence[int]
Bools = bool | Sequence[bool]
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]
_LAYOUT = "[B, *space, H, D] with one to three axes in space"


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token to its neighbourhood, in one, two or three dimensions.

    The neighbourhood of a token is the product, over the axes, of ``kernel_size`` places at
    distance ``dilation`` (arXiv 2204.07143, 2209.15001). At a border the window moves inwards and
    keeps its size; an even kernel has one place more on the left. With ``stride`` s, s tokens in
    a row share the window of their middle (arXiv 2504.16922); ``stride == kernel_size`` gives
    windows that do not overlap. On a causal axis a token sees itself and up to kernel_size - 1
    places before it. The rule is natten's; beyond it, any head dim, even 24 or 48, and the
    position bias that natten dropped in 0.20.

    Args:
        q: [B, *space, H, D], heads after space: ``[B, N, H, D]``, ``[B, Y, X, H, D]`` or
            ``[B, Z, Y, X, H, D]``. The rank decides the number of axes.
        k: as ``q``.
        v: [B, *space, H, Dv].
        kernel_size: places per axis; one int or one for each axis. At least 2 (1 on an axis of
            one token), and ``kernel_size * dilation`` at most the length of the axis.
        stride: 1 to kernel_size.
        dilation: at least 1; lengths that it does not divide are fine.
        is_causal: one bool or one for each axis.
        scale: of the scores; None means ``D ** -0.5``.
        rpb: [H, 2 k - 1 for each axis], relative position bias, added to the scaled scores:
            entry ``(key place - query place) / dilation + kernel_size - 1`` on each axis.
            Trainable.
        additional_keys: [B, M, H, D], seen by every query (prefix, class or register tokens).
        additional_values: [B, M, H, Dv].
        return_lse: also return the log-sum-exp of the scores, differentiable.
        backend: see ``visprune.ops``.

    Returns:
        [B, *space, H, Dv] in the dtype of ``q``; with ``return_lse`` also [B, *space, H] in fp32
        (fp64 for fp64 input).

    Raises:
        ConfigError: a wrong shape, dtype or parameter.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "neighborhood_attention"
    window = _window(name, q, kernel_size, stride, dilation, is_causal)
    shape(name, "k", k, tuple(q.shape))
    shape(name, "v", v, (*q.shape[:-1], v.shape[-1]))
    tensors = {"q": q, "k": k, "v": v}
    if additional_keys is not None and additional_values is not None:
        tensors |= {"additional_keys": additional_keys, "additional_values": additional_values}
        count = additional_keys.shape[1] if additional_keys.ndim == 4 else 1
        row = (q.shape[0], count, q.shape[-2])
        shape(name, "additional_keys", additional_keys, (*row, q.shape[-1]))
        shape(name, "additional_values", additional_values, (*row, v.shape[-1]))
    elif additional_keys is not None or additional_values is not None:
        raise ConfigError(f"{name}: give additional_keys and additional_values, or neither.")
    _dtypes(name, **tensors)
    _check_bias(name, rpb, q.shape[-2], window[0])
    extra = (additional_keys, additional_values)
    choice = choose(name, backend, q.device, lambda: na_op.why_not(q, k, v, rpb, *extra))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    given = (q, k, v, rpb, additional_keys, additional_values)
    out, lse = na_op.attend(*given, *window, scale, return_lse, choice)
    return out if lse is None or not return_lse else (out, lse)


def na_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores of every token with its neighbours: the first half of the unfused pair.

    ``na_av(na_qk(q, k, 7).softmax(-1), v, 7)`` is ``neighborhood_attention(q, k, v, 7)``, with the
    weights in between for dropout or a module's own. natten's op of this name (until 0.17) did
    not scale: give ``scale=1.0`` where the query is scaled already.

    Args:
        q: [B, *space, H, D].
        k: as ``q``.
        kernel_size: as in :func:`neighborhood_attention`, and so the parameters below.
        stride: as there.
        dilation: as there.
        is_causal: as there.
        scale: of the scores; None means ``D ** -0.5``.
        rpb: as there.
        backend: see ``visprune.ops``.

    Returns:
        [B, *space, H, K] in the dtype of ``q``, K the product of ``kernel_size``, neighbours in
        row-major order; -inf where a causal window is shorter.

    Raises:
        ConfigError: a wrong shape, dtype or parameter.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "na_qk"
    window = _window(name, q, kernel_size, stride, dilation, is_causal)
    shape(name, "k", k, tuple(q.shape))
    _dtypes(name, q=q, k=k)
    _check_bias(name, rpb, q.shape[-2], window[0])
    choice = choose(name, backend, q.device, lambda: na_op.why_not(q, k, None, rpb))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return na_op.na_qk(q, k, rpb, *window, scale, choice)


def na_av(
    attn: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of every token's neighbours: the second half of the unfused pair.

    Args:
        attn: [B, *space, H, K] any weights, K the product of ``kernel_size``, neighbours in
            row-major order. Where a causal window is shorter the weight does not count.
        v: [B, *space, H, Dv].
        kernel_size: as in :func:`neighborhood_attention`, and so the parameters below.
        stride: as there.
        dilation: as there.
        is_causal: as there.
        backend: see ``visprune.ops``.

    Returns:
        [B, *space, H, Dv] in the dtype of ``v``.

    Raises:
        ConfigError: a wrong shape, dtype or parameter.
        UnsupportedKernel: ``backend="triton"`` where it cannot run.
    """
    name = "na_av"
    window = _window(name, v, kernel_size, stride, dilation, is_causal, "v")
    shape(name, "attn", attn, (*v.shape[:-1], na_op.axis.product(window[0])))
    _dtypes(name, attn=attn, v=v)
    choice = choose(name, backend, v.device, lambda: na_op.why_not(v, None, None, attn))
    return na_op.na_av(attn, v, *window, choice)


def _window(
    name: str, t: Tensor, kernel: Ints, stride: Ints, dilation: Ints, causal: Bools, key: str = "q"
) -> Window:
    """The four parameters as one value for each axis, checked against the tensor."""
    given = (kernel, stride, dilation, causal)
    # What was checked once is remembered: over 14 x 14 tokens the checks are a twentieth of the
    # time. Plain numbers alone: True and 1.0 are equal to 1.
    if tuple(map(type, given)) == (int, int, int, bool) and not torch.compiler.is_compiling():
        with suppress(TypeError):  # a length is a symbol
            return _plain_window(name, t.shape, *given, key)
    return _checked_window(name, t.shape, *given, key)


def _checked_window(
    name: str, size: Sequence[int], kernel: Ints, stride: Ints, dilation: Ints, causal: Bools,
    key: str,
) -> Window:  # fmt: skip
    """As :func:`_window`, of a tensor of that size."""
    if len(size) not in (4, 5, 6):
        raise ConfigError(f"{name}: {key} must be {_LAYOUT}; got shape {list(size)}.")
    space = list(size[1:-2])
    if size[-1] == 0 or size[-2] == 0:
        raise ConfigError(
            f"{name}: {key} must be {_LAYOUT}, at least one head and feature; got {list(size)}."
        )
    kernels = per_axis(name, "kernel_size", kernel, len(space))
    strides = per_axis(name, "stride", stride, len(space))
    dilations = per_axis(name, "dilation", dilation, len(space))
    flags = flag_per_axis(name, "is_causal", causal, len(space))
    for at, (length, ks, st, di) in enumerate(zip(space, kernels, strides, dilations, strict=True)):
        # A length may be a symbol of a compiled graph. Only a refusal writes it into a text: that
        # would fix the symbol, and make a graph for every size.
        if not (2 <= ks <= length or ks == length == 1):
            allowed = f"2 to {length}" if length > 1 else "1"
            raise ConfigError(
                f"{name}: kernel_size must be {allowed} {_where(key, at, length)}; got {ks}."
            )
        if not 1 <= st <= ks:
            raise ConfigError(f"{name}: stride must be 1 to kernel_size = {ks}; got {st}.")
        if not 1 <= di <= length // ks:
            raise ConfigError(
                f"{name}: kernel_size * dilation must fit {_where(key, at, length)}: with "
                f"kernel_size {ks}, dilation must be 1 to {length // ks}; got {di}."
            )
    return tuple(kernels), tuple(strides), tuple(dilations), tuple(flags)


_plain_window = lru_cache(maxsize=256)(_checked_window)


def _where(key: str, at: int, length: int) -> str:
    return f"on axis {at} of {key} with {length} tokens"


def _dtypes(name: str, **tensors: Tensor) -> None:
    """Refuse integer tensors and mixed dtypes."""
    floating(name, **tensors)
    if len({t.dtype for t in tensors.values()}) > 1:
        got = ", ".join(f"{key} {t.dtype}" for key, t in tensors.items())
        raise ConfigError(f"{name}: {', '.join(tensors)} must have one dtype; got {got}.")


def _check_bias(name: str, rpb: Tensor | None, heads: int, kernel: Sequence[int]) -> None:
    if rpb is not None:
        floating(name, rpb=rpb)
        shape(name, "rpb (heads, 2 * kernel_size - 1)", rpb, (heads, *(2 * k - 1 for k in kernel)))
