# SPDX-License-Identifier: Apache-2.0
"""Ragged decoding and its quantiser: meaning, room, paths, memory, compile, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from visprune import ops
from visprune.errors import ConfigError, UnsupportedKernel
from visprune.kernels.ragged_decode import bench, cases, op, quantize, reference, torch_impl
from visprune.ops import QuantizedKV


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, counts: Sequence[int], causal: bool
) -> Tensor:
    """Plain attention, one head at a time over a cache cut out for it."""
    b, h, r, _ = q.shape
    kv = len(counts) // b
    out = torch.zeros(b, h, r, v.shape[1], dtype=q.dtype)
    for i in range(b):
        for j in range(h):
            segment = i * kv + j // (h // kv)
            n, first = counts[segment], int(offsets[segment])
            slots = slice(first, first + n)
            late = torch.arange(n) > torch.arange(n - r, n)[:, None]
            mask = ~late if causal else torch.ones(r, n, dtype=torch.bool)
            made = scaled_dot_product_attention(q[i, j], k[slots], v[slots], mask)
            out[i, j] = torch.where(mask.any(-1, keepdim=True), made, 0.0)
    return out


@given(
    counts=st.lists(st.integers(0, 80), min_size=4, max_size=4), room=st.integers(0, 40),
    group=st.integers(1, 3), rows=st.integers(1, 5), causal=st.booleans(), aligned=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_every_head_sees_its_own_slots_and_no_other(
    counts: list[int], room: int, group: int, rows: int, causal: bool, aligned: bool, seed: int
) -> None:
    lengths = torch.tensor(counts)
    offsets = ops.ragged_offsets(lengths + room, 32 if aligned else 1)
    slots = int(offsets[-1])
    q = seeded(2, 2 * group, rows, 16, seed=seed)
    k, v = seeded(slots, 16, seed=seed + 1), seeded(slots, 8, seed=seed + 2)
    want = dense(q, k, v, offsets, counts, causal)
    for small in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if small:  # pieces of a head, which meet by their log-sum-exps
                patch.setattr(torch_impl, "MAX_SCORES", 7 * group * rows)
            got = ops.ragged_decode(q, k, v, offsets, lengths, causal=causal)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


POISON = {"nan": math.nan, "inf": math.inf, "huge": 3e38}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
@pytest.mark.parametrize("align", [1, 32, 64])
def test_what_lies_in_the_room_changes_nothing(poison: float, align: int) -> None:
    lengths = torch.tensor([5, 40, 0, 33])
    offsets = ops.ragged_offsets(lengths + 3, align)
    q, k, v = seeded(1, 8, 1, 16), seeded(int(offsets[-1]), 16), seeded(int(offsets[-1]), 16)
    bias = seeded(len(k))
    used = torch.zeros(len(k), dtype=torch.bool)
    for first, count in zip(offsets.tolist(), lengths.tolist(), strict=False):
        used[first : first + count] = True
    clean = ops.ragged_decode(q, k, v, offsets, lengths, bias=bias, return_lse=True)
    assert clean[0][:, 4:6].eq(0).all()
    assert clean[1][:, 4:6].isneginf().all()
    bad = (k.where(used[:, None], poison), v.where(used[:, None], poison))
    for given_bias in (bias, bias.where(used, poison)):
        got = ops.ragged_decode(q, *bad, offsets, lengths, bias=given_bias)
        torch.testing.assert_close(got, clean[0])
    out, lse = ops.ragged_decode(q, *bad, offsets, lengths, bias=bias, return_lse=True)
    torch.testing.assert_close((out, lse), clean)


@pytest.mark.parametrize("align", [1, 32, 64])
def test_a_slot_that_is_not_finite_spoils_its_own_head_alone(align: int) -> None:
    lengths = torch.tensor([20, 40, 9])
    offsets = ops.ragged_offsets(lengths, align)
    q, k, v = seeded(1, 3, 1, 8), seeded(int(offsets[-1]), 8), seeded(int(offsets[-1]), 8)
    clean = ops.ragged_decode(q, k, v, offsets, lengths)
    v[int(offsets[1]) + 39] = math.nan
    got = ops.ragged_decode(q, k, v, offsets, lengths)
    assert got[0, 1].isnan().all()
    torch.testing.assert_close(got[0, [0, 2]], clean[0, [0, 2]])


def test_one_thread_reads_few_heads_one_by_one(monkeypatch: Any) -> None:
    lengths = torch.tensor([20, 70, 1, 9])
    offsets = ops.ragged_offsets(lengths + 1)
    q, k, v = seeded(1, 8, 1, 8), seeded(int(offsets[-1]), 8), seeded(int(offsets[-1]), 8)
    want = reference.ragged_decode(q, k, v, offsets, lengths, 8**-0.5, None, False, 0.0)[0]
    whole, called = torch_impl._by_blocks, []

    def noted(*args: Any) -> Tensor:
        called.append(threads)
        return whole(*args)

    monkeypatch.setattr(torch_impl, "_by_blocks", noted)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        got = ops.ragged_decode(q, k, v, offsets, lengths)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert called == [2]


def test_aligned_heads_take_the_path_of_all_heads_at_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch_impl, "FEW_HEADS", 0)

    def refuse(*args: Any) -> None:
        raise AssertionError("head by head")

    lengths = torch.tensor([20, 70, 0, 9])  # one of them empty, with room
    offsets = ops.ragged_offsets(lengths + 1)
    assert offsets.tolist() == [0, 64, 192, 256, 320]
    q, k, v = seeded(1, 4, 2, 8), seeded(320, 8), seeded(320, 8)
    bias = torch.zeros(320).index_fill(0, torch.arange(256, 320), -torch.inf)  # one all hidden
    for b in (None, bias):
        want = ops.ragged_decode(q, k, v, offsets, lengths, bias=b, return_lse=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_impl, "_by_heads", refuse)
            got = ops.ragged_decode(q, k, v, offsets, lengths, bias=b)
        torch.testing.assert_close(got, want[0])
        assert got[:, 2:].eq(0).any(-1).any(-1).tolist() == [[True, b is not None]]
    monkeypatch.setattr(torch_impl, "_by_heads", refuse)
    with pytest.raises(AssertionError, match="head by head"):
        ops.ragged_decode(q, k, v, offsets + 0, lengths, softcap=3.0)


def test_a_cache_that_grows_into_its_room() -> None:
    """Token by token, as a decode step writes: every head has its own next slot."""
    lengths = torch.tensor([30, 2])
    offsets = ops.ragged_offsets(lengths + 8)
    k, v = torch.zeros(int(offsets[-1]), 8), torch.zeros(int(offsets[-1]), 8)
    for first, count in zip(offsets.tolist(), lengths.tolist(), strict=False):
        k[first : first + count], v[first : first + count] = seeded(count, 8), seeded(count, 8)
    for step in range(8):
        at = offsets[:-1] + lengths
        k[at], v[at] = seeded(2, 8, seed=step), seeded(2, 8, seed=step + 50)
        lengths = lengths + 1
        q = seeded(1, 4, 1, 8, seed=step + 99)
        want = dense(q, k, v, offsets, lengths.tolist(), False)
        torch.testing.assert_close(ops.ragged_decode(q, k, v, offsets, lengths), want)


def test_a_merged_slot_with_the_log_of_its_count_weighs_as_its_members() -> None:
    k, v, times = seeded(9, 8), seeded(9, 8, seed=1), torch.tensor([1, 3, 2, 1, 1, 4, 1, 2, 1])
    q, merged = seeded(1, 2, 1, 8, seed=2), torch.tensor([0, 4, 9])
    many = torch.tensor([0, int(times[:4].sum()), int(times.sum())])
    args = (k.repeat_interleave(times, 0), v.repeat_interleave(times, 0), many)
    got = ops.ragged_decode(q, k, v, merged, bias=times.float().log())
    torch.testing.assert_close(got, ops.ragged_decode(q, *args))


def test_parts_of_a_cache_merge_into_the_whole() -> None:
    """Also a part in which a head has nothing, and a head that has nothing anywhere."""
    q, k, v = seeded(1, 6, 2, 8), seeded(50, 8), seeded(50, 8, seed=1)
    whole = ops.ragged_decode(q, k, v, torch.tensor([0, 20, 50, 50]), return_lse=True)
    old, new = [*range(20), *range(30, 50)], [*range(20, 30)]
    parts = [
        ops.ragged_decode(q, k[old], v[old], torch.tensor([0, 20, 40, 40]), return_lse=True),
        ops.ragged_decode(q, k[new], v[new], torch.tensor([0, 0, 10, 10]), return_lse=True),
    ]
    merged = ops.merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    torch.testing.assert_close(merged, whole)
    assert merged[0][:, 4:].eq(0).all()


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                own = t.numel() if t.untyped_storage().nbytes() else 0
                self.numbers = max(self.numbers, own if t._base is None else 0)
        return out


@pytest.mark.parametrize("align", [1, 32, 64])
def test_nothing_is_padded_to_the_longest_head(align: int) -> None:
    lengths = torch.tensor([4096] + [32] * 31)
    offsets = ops.ragged_offsets(lengths, align)
    slots = int(offsets[-1])
    q, k, v = seeded(1, 64, 1, 32), seeded(slots, 32), seeded(slots, 32)
    args = (offsets, lengths, 0.2, None, False, 0.0, False)
    with Largest() as seen:
        torch_impl.ragged_decode(q, k, v, *args)
    made = slots * 32
    assert seen.numbers <= made < 32 * 4096 * 2  # scores, or one head's slots; never 32 x 4096


# --- quantised ------------------------------------------------------------------------------------


@given(
    n=st.integers(0, 40), width=st.integers(1, 5), lead=st.sampled_from([(), (2,), (2, 3)]),
    bits=st.sampled_from([2, 4, 8]), axis=st.sampled_from(["channel", "token"]),
    group=st.integers(1, 40), shift=st.sampled_from([0.0, 100.0, -7.0]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=150)
def test_the_error_is_at_most_half_a_step(
    n: int, width: int, lead: tuple[int, ...], bits: int, axis: str, group: int, shift: float,
    seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    dim = width * 4
    x = (seeded(*lead, n, dim, seed=seed) + shift).to(dtype)
    got = ops.quantize_kv(x, bits, axis, group)
    assert got.shape == x.shape
    assert got.codes.shape == (*lead, n, dim * bits // 8)
    back = ops.dequantize_kv(got)
    assert back.dtype == dtype
    along = -2 if axis == "channel" else -1
    step = got.scale.double().repeat_interleave(group, along).narrow(along, 0, x.shape[along])
    # The numbers of a group go through fp32, and come back in the dtype of x.
    rounding = 2 * torch.finfo(dtype).eps * (x.double().abs() + step)
    error = (back.double() - x.double()).abs()
    assert (error <= step / 2 * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_undone_by_unpacking(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 16)).to(torch.uint8)
    packed = quantize.pack(codes, bits)
    assert packed.shape == (3, 5, 16 * bits // 8)
    assert torch.equal(quantize.unpack(packed, bits), codes)


def test_bytes_of_4_and_2_bits() -> None:
    x = seeded(2880, 128)
    assert ops.quantize_kv(x, 4, "channel", 32).nbytes == 2880 * 64 + 2 * 90 * 128 * 4
    assert ops.quantize_kv(x.half(), 2, "token", 64).nbytes == 2880 * 32 + 2 * 2880 * 2 * 2


def test_equal_numbers_are_exact_and_what_is_not_finite_stays_in_its_group() -> None:
    x = torch.full((8, 8), 0.1)
    assert torch.equal(ops.dequantize_kv(ops.quantize_kv(x, 2, "channel", 4)), x)
    x[5, 3] = math.inf
    back = ops.dequantize_kv(ops.quantize_kv(x, 4, "channel", 4))
    assert back[4:, 3].isnan().all()
    back[4:, 3] = 0.1
    assert torch.equal(back, torch.full((8, 8), 0.1))


def test_room_widens_no_range() -> None:
    x, valid = seeded(12, 8), torch.arange(12) % 4 != 3
    poisoned = x.where(valid[:, None], math.nan)
    for axis in ("channel", "token"):
        want = ops.quantize_kv(x[valid], 4, axis, 3 if axis == "channel" else 4)
        got = ops.quantize_kv(poisoned, 4, axis, 4, valid)
        assert torch.equal(ops.dequantize_kv(got)[valid], ops.dequantize_kv(want))
    nobody = ops.quantize_kv(poisoned, 2, "channel", 4, torch.zeros(12, dtype=torch.bool))
    assert nobody.scale.eq(0).all()


@given(
    counts=st.lists(st.integers(0, 50), min_size=2, max_size=2), bits=st.sampled_from([2, 4, 8]),
    group=st.integers(1, 33), rows=st.integers(1, 3), seed=st.integers(0, 99),
    chunk=st.sampled_from([1, 5, 2048]), align=st.sampled_from([1, 32]),
)  # fmt: skip
@settings(max_examples=60)
def test_codes_are_read_as_the_numbers_they_stand_for(
    counts: list[int], bits: int, group: int, rows: int, seed: int, chunk: int, align: int
) -> None:
    lengths = torch.tensor(counts)
    offsets = ops.ragged_offsets(lengths, align)
    q, x = seeded(1, 4, rows, 16, seed=seed), seeded(int(offsets[-1]), 16, seed=seed + 1)
    k, v = (ops.quantize_kv(x, bits, axis, group) for axis in ("channel", "token"))
    want = ops.ragged_decode(q, ops.dequantize_kv(k), ops.dequantize_kv(v), offsets, lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, "CHUNK", chunk)
        got = ops.ragged_decode(q, k, v, offsets, lengths)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_codes_are_numbers_for_a_piece_of_a_head_only(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch_impl, "CHUNK", 64)
    x, q, offsets = seeded(2048, 32), seeded(1, 1, 1, 32), torch.tensor([0, 2048])
    k, v = ops.quantize_kv(x, 4, "channel", 32), ops.quantize_kv(x, 4, "token", 32)
    with Largest() as seen:
        torch_impl.ragged_decode_quantized(
            q, k.codes, k.scale, k.zero, v.codes, v.scale, v.zero, (4, 4), (32, 32),
            (True, False), offsets, None, 0.2, None, False, 0.0, False,
        )  # fmt: skip
    assert seen.numbers <= 64 * 32 * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_codes_with_scales_of_another_dtype(dtype: torch.dtype) -> None:
    q, x, offsets = seeded(1, 2, 1, 16), seeded(40, 16), torch.tensor([0, 30, 40])
    k, v = ops.quantize_kv(x, 4, "channel", 8), ops.quantize_kv(x, 4, "token", 8)
    got = ops.ragged_decode(q.to(dtype), k, v, offsets)
    assert got.dtype == dtype
    want = ops.ragged_decode(q, k, v, offsets)
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


def test_poisoned_room_of_codes() -> None:
    lengths, offsets = torch.tensor([5, 20]), torch.tensor([0, 32, 64])
    q, x = seeded(1, 2, 1, 16), seeded(64, 16)
    used = torch.arange(64) % 32 < torch.tensor([5, 20]).repeat_interleave(32)
    k = ops.quantize_kv(x.where(used[:, None], math.nan), 4, "channel", 32, used)
    v = ops.quantize_kv(x.where(used[:, None], math.nan), 4, "token", 16, used)
    got = ops.ragged_decode(q, k, v, offsets, lengths)
    want = ops.ragged_decode(q, ops.dequantize_kv(k), ops.dequantize_kv(v), offsets, lengths)
    assert not got.isnan().any()
    torch.testing.assert_close(got, want)


# --- how it is called -----------------------------------------------------------------------------

Q, K, V = seeded(1, 4, 1, 8), seeded(10, 8), seeded(10, 6)
OFFSETS = torch.tensor([0, 4, 10])


@pytest.mark.parametrize("key", ["ragged", "blocks_counts", "room", "queries_causal"])
def test_opcheck(key: str) -> None:
    case = next(c for c in cases.CASES if c.name == key)
    torch.library.opcheck(
        op.ragged_decode, (), {**case.inputs(), "with_lse": True, "backend": "torch"}
    )


@pytest.mark.parametrize("key", ["codes_4", "codes_2", "codes_mixed"])
def test_opcheck_of_codes(key: str) -> None:
    case = next(c for c in cases.CASES if c.name == key)
    rest = {"with_lse": True, "backend": "torch"}
    torch.library.opcheck(op.ragged_decode_quantized, (), {**case.inputs(), **rest})


def test_no_graph_break() -> None:
    def decode(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        out, lse = ops.ragged_decode(q, k, v, offsets, return_lse=True)
        codes = ops.quantize_kv(k, 4, "channel", 4)
        more, more_lse = ops.ragged_decode(q, codes, codes, offsets, return_lse=True)
        return out.sum() + ops.merge_attention([more, more], [lse, more_lse])[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Q, K, V, OFFSETS), decode(Q, K, V, OFFSETS))


def test_half_types_come_back_as_they_came() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        args = (Q.to(dtype), K.to(dtype), V.to(dtype), OFFSETS)
        out, lse = ops.ragged_decode(*args, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(
            out.float(), ops.ragged_decode(Q, K, V, OFFSETS), rtol=0.05, atol=0.05
        )


def decode(**changed: Any) -> Callable[[], object]:
    args = {"q": Q, "k": K, "v": V, "offsets": OFFSETS, **changed}
    return lambda: ops.ragged_decode(**args)


CODES = ops.quantize_kv(K, 4, "token", 4)
BAD = {
    "rank of q": (decode(q=Q[0]), r"\[B, H, R, d\].*got \[4, 1, 8\]"),
    "channels": (decode(k=K[:, :4]), r"\[S, d\]"),
    "slots": (decode(v=V[:9]), r"\[10, 8\] and \[9, 6\]"),
    "dtypes": (decode(k=K.half()), "one dtype.*float16"),
    "integers": (decode(q=Q.long()), "q must be a floating-point"),
    "half quantised": (decode(k=CODES), "both be quantised, or neither; got k QuantizedKV and v T"),
    "offsets dtype": (decode(offsets=OFFSETS.int()), "offsets must be int64.*int32"),
    "device": (decode(offsets=OFFSETS.to("meta")), "offsets is on meta, q on cpu; move it"),
    "offsets rank": (decode(offsets=OFFSETS[None]), r"one dimension; got torch.int64 \[1, 3\]"),
    "heads": (decode(offsets=torch.tensor([0, 2, 4, 10])), r"divisor of the 4 .*got \[4\]"),
    "no heads": (decode(offsets=torch.tensor([0])), "name no key head"),
    "no offsets": (decode(offsets=torch.tensor([], dtype=torch.int64)), r"B \* Hkv \+ 1"),
    "offsets fall": (decode(offsets=torch.tensor([0, 7, 4])), r"rise from 0.*\[0, 7, 4\]"),
    "offsets start": (decode(offsets=torch.tensor([1, 7, 9])), "rise from 0"),
    "offsets beyond": (decode(offsets=torch.tensor([0, 7, 11])), "at most the 10 slots"),
    "lengths shape": (decode(lengths=torch.tensor([4])), r"lengths must have shape \[2\]"),
    "lengths": (decode(lengths=torch.tensor([4, 7])), "got 7 for segment 1, which has 6 slots"),
    "negative": (decode(lengths=torch.tensor([-1, 6])), "got -1 for segment 0"),
    "bias": (decode(bias=torch.zeros(9)), r"bias must have shape \[10\]"),
    "bias dtype": (decode(bias=torch.ones(10).bool()), "bias must be a floating.*bool"),
    "softcap": (decode(softcap=0.0), "softcap must be positive"),
    "bits": (lambda: ops.quantize_kv(K, 3), "one of 2, 4, 8; got 3"),
    "axis": (lambda: ops.quantize_kv(K, 4, "head"), "channel, token; got 'head'"),
    "group": (lambda: ops.quantize_kv(K, 4, group_size=0), "at least 1; got 0"),
    "odd channels": (lambda: ops.quantize_kv(V, 2), r"multiple of 4 .*got \[10, 6\]"),
    "one dimension": (lambda: ops.quantize_kv(K[0]), r"\[\.\.\., N, d\]"),
    "valid": (lambda: ops.quantize_kv(K, valid=torch.ones(9).bool()), r"valid.*\[10\]"),
    "valid dtype": (lambda: ops.quantize_kv(K, valid=torch.ones(10)), "valid must be bool"),
    "align": (lambda: ops.ragged_offsets(OFFSETS, 0), "at least 1; got 0"),
    "nothing to merge": (lambda: ops.merge_attention([], []), "at least one; got 0 and 0"),
    "merge shapes": (lambda: ops.merge_attention([Q], [Q]), "log-sum-exp must have shape"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_is_allowed(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedKernel, match="needs a CUDA device"):
        decode(backend="triton")()
    with pytest.raises(UnsupportedKernel, match=r"no gradient.*no_grad"):
        decode(k=K.clone().requires_grad_())()
    with torch.no_grad():
        decode(k=K.clone().requires_grad_())()
    reasons = op.why_not(Q.double(), (300, 8), K)
    assert any("float64" in r for r in reasons)
    assert any("head dim 300" in r for r in reasons)


def test_the_bench_agrees_and_counts_bytes() -> None:
    rows = bench.run(rounds=1, threads=1, shapes=(("small", 160, 4, 2, 16),), layers=2)
    assert rows
    assert all(row["agree"] for row in rows)
    kinds = {row["storage"]: row for row in rows}
    assert set(kinds) == {
        "dense",
        "dense, as many slots",
        "10 % per head",
        "10 % per head, 4 bit",
        "10 % per head, 2 bit",
    }


def test_reference_of_codes_is_that_of_the_quantiser() -> None:
    x = seeded(7, 8)
    for bits, axis, group in ((4, "channel", 3), (2, "token", 4), (8, "token", 8)):
        got: QuantizedKV = ops.quantize_kv(x, bits, axis, group)
        args = (got.codes, got.scale, got.zero, bits, group, axis == "channel")
        torch.testing.assert_close(reference.dequantize(*args), ops.dequantize_kv(got))
