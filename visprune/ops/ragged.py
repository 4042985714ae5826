# SPDX-License-Identifier: Apache-2.0
"""Decoding over ragged keys and values, and their quantiser (see ``visprune.ops``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visprune.errors import ConfigError, UnsupportedKernel
from visprune.kernels.ragged_decode import op as ragged_op
from visprune.ops.check import choose, floating, one_of, shape

BITS = (2, 4, 8)
AXES = ("channel", "token")
RAGGED_BLOCK = ragged_op.BLOCK


@dataclass(frozen=True, eq=False)
class QuantizedKV:
    """Keys or values as codes of a few bits; from :func:`quantize_kv`.

    Attributes:
        codes: uint8 [..., N, d * bits / 8]; byte c holds channels c, c + width, c + 2 width, ...
        scale: of every group, [..., ceil(N / group_size), d] with ``axis="channel"``,
            [..., N, ceil(d / group_size)] with ``"token"``.
        zero: its smallest number, as ``scale``.
        bits: 2, 4 or 8.
        axis: what a group lies in.
        group_size: numbers that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    axis: str
    group_size: int

    @property
    def shape(self) -> torch.Size:
        """Of the numbers, [..., N, d]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero))


def quantize_kv(
    x: Tensor,
    bits: int = 4,
    axis: str = "channel",
    group_size: int = 32,
    valid: Tensor | None = None,
) -> QuantizedKV:
    """Asymmetric rounding in groups: ``|x - dequantize_kv(quantize_kv(x))| <= scale / 2``.

    The bound holds for every number of a group up to the rounding of ``x``'s dtype. KIVI
    (arXiv 2402.02750) takes keys per channel and values per token. A group with a number that is
    not finite comes back as NaN.

    Args:
        x: [..., N, d]; d a multiple of ``8 / bits``. Ragged storage is [S, d].
        bits: 2, 4 or 8.
        axis: ``"channel"``: ``group_size`` neighbouring slots of a channel share a scale;
            ``"token"``: ``group_size`` neighbouring channels of a slot do.
        group_size: the last group may be smaller. In ragged storage groups of slots mix two
            heads unless each starts at a multiple of it (:func:`ragged_offsets`).
        valid: bool [..., N]: False for room that holds no slot; it widens no range.

    Raises:
        ConfigError: a wrong shape, dtype or setting.
    """
    name = "quantize_kv"
    floating(name, x=x)
    if bits not in BITS:
        raise ConfigError(f"{name}: bits must be one of 2, 4, 8; got {bits!r}.")
    one_of(f"{name}: axis", axis, AXES)
    if not isinstance(group_size, int) or group_size < 1:
        raise ConfigError(f"{name}: group_size must be an int of at least 1; got {group_size!r}.")
    if x.ndim < 2 or x.shape[-1] % (8 // bits):
        raise ConfigError(
            f"{name}: x must be [..., N, d] with d a multiple of {8 // bits} "
            f"(numbers in a byte at {bits} bits); got {list(x.shape)}."
        )
    shape(name, "valid", valid, tuple(x.shape[:-1]))
    if valid is not None and valid.dtype != torch.bool:
        raise ConfigError(f"{name}: valid must be bool; got {valid.dtype}.")
    parts = ragged_op.pack_quantized(x, bits, group_size, axis == "channel", valid)
    return QuantizedKV(*parts, bits=bits, axis=axis, group_size=group_size)


def dequantize_kv(x: QuantizedKV) -> Tensor:
    """The numbers that the codes stand for, [..., N, d] in the dtype of the scales."""
    args = (x.bits, x.group_size, x.axis == "channel")
    return ragged_op.unpack_quantized(x.codes, x.scale, x.zero, *args).to(x.scale.dtype)


def ragged_offsets(lengths: Tensor, align: int = RAGGED_BLOCK) -> Tensor:
    """Where the segments of ragged storage start, each at a multiple of ``align``.

    Args:
        lengths: int [B * Hkv], [B, Hkv] or the like: slots (with any room to grow) of each head.
        align: 1 packs without gaps. At multiples of 64 or 32 a decode on the CPU takes all heads
            at once; it then reads the gaps too, and is slower if they hold NaN or infinity.

    Returns:
        int64 [B * Hkv + 1], the last one the slots to store: the ``offsets`` of
        :func:`ragged_decode`, whose ``lengths`` are those given here (without the room).
    """
    if align < 1:
        raise ConfigError(f"ragged_offsets: align must be at least 1; got {align}.")
    sizes = (lengths.flatten().to(torch.int64) + (align - 1)) // align * align
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def ragged_decode(
    q: Tensor,
    k: Tensor | QuantizedKV,
    v: Tensor | QuantizedKV,
    offsets: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one or a few queries over keys and values that each head has its own number of.

    Exact softmax over the slots of the query's own key head. Nothing is padded to the longest
    head, and no key head is repeated. A query that sees no slot (a head with none left, or all of
    them hidden) gives zeros. There is no gradient: a tensor that asks for one is refused.

    Args:
        q: [B, H, R, d], after rotary embedding; H a multiple of Hkv.
        k: [S, d], the slots of all sequences and key heads one after the other, or those of
            :func:`quantize_kv`, which are read as codes.
        v: [S, dv], quantised if the keys are.
        offsets: int64 [B * Hkv + 1]: head g of sequence b has the slots from
            ``offsets[b * Hkv + g]`` to the next one's. It starts at 0.
        lengths: int64 [B * Hkv]: how many of them are in use, the rest being room to grow;
            None means all.
        scale: of the scores; None means ``d ** -0.5``.
        bias: [S], added to the scores of a slot (the logarithm of the tokens that were merged
            into it; -inf hides it).
        causal: the queries are the newest R slots of every head: query r sees the slots up to
            ``length - R + r``. With one query it changes nothing.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the bias.
        return_lse: also the log-sum-exp, for :func:`merge_attention`.
        backend: see ``visprune.ops``.

    Returns:
        [B, H, R, dv] in the dtype of ``q``; with ``return_lse`` also fp32 [B, H, R], -inf where
        there was nothing to see.

    Raises:
        ConfigError: a wrong shape, dtype or setting; offsets and lengths that do not fit the
            storage (looked at on the CPU).
        UnsupportedKernel: ``backend="triton"`` where it cannot run, or a gradient is asked for.
    """
    name = "ragged_decode"
    parts = _tensors(name, q, k, v)
    _check_layout(name, q, k, offsets, lengths, bias, softcap)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *parts)):
        raise UnsupportedKernel(
            f"{name}: a tensor requires grad, and decoding has no gradient. "
            "Call it under torch.no_grad() or detach the tensors."
        )
    dims = (q.shape[3], v.shape[1])
    others = (*parts, offsets, lengths, bias)
    choice = choose(name, backend, q.device, lambda: ragged_op.why_not(q, dims, *others))
    scale = dims[0] ** -0.5 if scale is None else float(scale)
    rest = (offsets, lengths, scale, bias, causal, float(softcap or 0.0), return_lse, choice)
    if isinstance(k, QuantizedKV) and isinstance(v, QuantizedKV):
        pairs = ((k.bits, v.bits), (k.group_size, v.group_size))
        per_channel = (k.axis == "channel", v.axis == "channel")
        out, lse = ragged_op.ragged_decode_quantized(q, *parts, *pairs, per_channel, *rest)
    else:
        out, lse = ragged_op.decode(q, *parts, *rest)
    return (out, lse) if return_lse else out


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention from those over disjoint sets of slots, e.g. a quantised part and the newest.

    Args:
        outs: each [..., R, dv].
        lses: their log-sum-exps, each [..., R].

    Returns:
        The output over all slots, in the dtype of the first, and its log-sum-exp. Where no part
        saw a slot: zeros and -inf.
    """
    if not outs or len(outs) != len(lses):
        raise ConfigError(
            "merge_attention: give as many log-sum-exps as outputs, at least one; "
            f"got {len(outs)} and {len(lses)}."
        )
    for out, lse in zip(outs, lses, strict=True):
        shape("merge_attention", "an output", out, tuple(outs[0].shape))
        shape("merge_attention", "a log-sum-exp", lse, tuple(outs[0].shape[:-1]))
    stacked = torch.stack(list(lses))
    total = torch.logsumexp(stacked, 0)
    weights = (stacked - total.masked_fill(total.isneginf(), 0.0)).exp()
    mixed = (torch.stack(list(outs)) * weights[..., None]).sum(0)
    return mixed.to(outs[0].dtype), total


def _tensors(
    name: str, q: Tensor, k: Tensor | QuantizedKV, v: Tensor | QuantizedKV
) -> tuple[Tensor, ...]:
    """The tensors of keys and values, of checked kind, dtype and rank."""
    if isinstance(k, QuantizedKV) and isinstance(v, QuantizedKV):
        parts: tuple[Tensor, ...] = (k.codes, k.scale, k.zero, v.codes, v.scale, v.zero)
        floating(name, q=q, **{"k.scale": k.scale, "v.scale": v.scale})
    elif isinstance(k, QuantizedKV) or isinstance(v, QuantizedKV):
        raise ConfigError(
            f"{name}: keys and values must both be quantised, or neither; "
            f"got k {type(k).__name__} and v {type(v).__name__}."
        )
    else:
        parts = (k, v)
        floating(name, q=q, k=k, v=v)
        if not q.dtype == k.dtype == v.dtype:
            raise ConfigError(
                f"{name}: q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}."
            )
    sizes = (q.shape, k.shape, v.shape)
    fits = len(sizes[0]) == 4 and len(sizes[1]) == len(sizes[2]) == 2
    if not fits or sizes[1][1] != sizes[0][3] or sizes[1][0] != sizes[2][0]:
        raise ConfigError(
            f"{name}: q must be [B, H, R, d], k [S, d] and v [S, dv]; "
            f"got {list(sizes[0])}, {list(sizes[1])} and {list(sizes[2])}."
        )
    return parts


def _check_layout(
    name: str,
    q: Tensor,
    k: Tensor | QuantizedKV,
    offsets: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    for key, t in (("offsets", offsets), ("lengths", lengths), ("bias", bias)):
        if t is not None and t.device != q.device:
            raise ConfigError(f"{name}: {key} is on {t.device}, q on {q.device}; move it there.")
    for key, t in (("offsets", offsets), ("lengths", lengths)):
        if t is not None and (t.dtype != torch.int64 or t.ndim != 1):
            raise ConfigError(
                f"{name}: {key} must be int64 with one dimension; got {t.dtype} {list(t.shape)}."
            )
    batch, heads = q.shape[:2]
    segments = offsets.shape[0] - 1
    if segments < 0 or (
        segments % batch or heads % (segments // batch or 1) if batch else segments
    ):
        raise ConfigError(
            f"{name}: offsets must be [B * Hkv + 1] with B = {batch} and Hkv a divisor of the "
            f"{heads} query heads; got {list(offsets.shape)}."
        )
    if batch and not segments:
        raise ConfigError(f"{name}: offsets name no key head; they must be [B * Hkv + 1].")
    shape(name, "lengths", lengths, (segments,))
    shape(name, "bias", bias, (k.shape[0],))
    if bias is not None and not bias.is_floating_point():
        raise ConfigError(f"{name}: bias must be a floating-point tensor; got {bias.dtype}.")
    if softcap is not None and softcap <= 0:
        raise ConfigError(f"{name}: softcap must be positive or None; got {softcap}.")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(name, k.shape[0], offsets, lengths)


def _check_values(name: str, slots: int, offsets: Tensor, lengths: Tensor | None) -> None:
    starts = offsets.tolist()
    ends = starts[1:]
    if starts[0] != 0 or starts[-1] > slots or starts != sorted(starts):
        raise ConfigError(
            f"{name}: offsets must rise from 0 to at most the {slots} slots stored; got {starts}."
        )
    if lengths is None:
        return
    for i, (start, end, count) in enumerate(zip(starts, ends, lengths.tolist(), strict=False)):
        if not 0 <= count <= end - start:
            raise ConfigError(
                f"{name}: lengths must fit their segments; got {count} for segment {i}, "
                f"which has {end - start} slots."
            )
