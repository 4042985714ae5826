# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for NVIDIA GPUs, which no interpreter shows; no GPU is needed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.test_kernels import CASES, DTYPES, NAMES, run
from visprune.kernels.common import requirements

IMPLS = [importlib.import_module(f"visprune.kernels.{name}.triton_impl") for name in NAMES]
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
H100 = GPUTarget("cuda", 90, 32)
SHARED = 166_912  # bytes that an A100 has for one program; an H100 has 232,448
# One case for each kernel and each way of compiling it.
CHOSEN = (
    "greedy_diverse-k_center_given",
    "greedy_diverse-max_sum_mean",
    "greedy_diverse-dpp",
    "attention_rows-rows_gqa_mean",
    "attention_rows-rows_bool",
    "attention_rows-rows_causal",
    "attention_rows-columns_causal",
    "reduce_tokens-pairs",
    "reduce_tokens-gather",
    "hilo_attention-hilo",
    "hilo_attention-hilo_window_7",
    "neighborhood_attention-line",
    "neighborhood_attention-plane_dilated_bias",
    "neighborhood_attention-space",
    "neighborhood_attention-qk_plane",
    "neighborhood_attention-av_plane",
    "ragged_decode-queries_causal",
    "ragged_decode-blocks_counts",
    "ragged_decode-codes_2",
    "ragged_decode-codes_mixed",
    "ragged_decode-codes_8",
    "sparse_attention-index",
    "sparse_attention-blocks",
    "sparse_attention-topk",
)


def kind(value: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 1 << 31 else "i64"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Launches are taken down instead of done; tensors of the CPU may go to Triton."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def take(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append((kernel, args, options))

    monkeypatch.setattr(requirements, "INTERPRET", True)
    for module in IMPLS:
        monkeypatch.setattr(module, "launch", take)
    return found


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    switches = {name: value for name, value in options.items() if name in kernel.arg_names}
    rest = {name: value for name, value in options.items() if name not in switches}
    signature = dict(zip(kernel.arg_names, map(kind, args), strict=False))
    signature |= dict.fromkeys(switches, "constexpr")
    assert len(signature) == len(kernel.arg_names), "an argument is missing"
    return triton.compile(ASTSource(kernel, signature, switches), target=H100, options=rest)


def best_partners() -> None:
    """Apart: the operator goes on to use the result, which there is none of."""
    impl = importlib.import_module("visprune.kernels.reduce_tokens.triton_impl")
    impl.best_partners(torch.randn(2, 197, 64), True, False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("key", CHOSEN)
def test_it_compiles_and_fits(key: str, dtype: str, launched: list[Any]) -> None:
    case = CASES[key]
    run(case, case.inputs(DTYPES[dtype]), "triton")
    assert launched
    for kernel, args, options in launched:
        made = compiled(kernel, args, options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= SHARED, kernel.__name__


def test_the_match_of_token_merging_compiles(launched: list[Any]) -> None:
    best_partners()
    ((kernel, args, options),) = launched
    assert compiled(kernel, args, options).asm["cubin"]


def test_no_kernel_is_left_out(launched: list[Any]) -> None:
    best_partners()
    for key in CHOSEN:
        run(CASES[key], CASES[key].inputs(), "triton")
    defined = {
        name
        for module in IMPLS
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert {kernel.__name__ for kernel, _, _ in launched} == defined
