# SPDX-License-Identifier: Apache-2.0
"""The kernels on a CUDA device: both backends, by the rules that the CPU is held to.

Run where there is one with ``pytest -m gpu``; elsewhere pytest counts these as deselected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_kernels import (
    CASES,
    DTYPES,
    EXACT,
    SMOOTH,
    by_id,
    cast,
    check_errors,
    moved,
    run,
    twisted,
)
from visprune import ops
from visprune.kernels.common.spec import Case

pytestmark = pytest.mark.gpu

both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@by_id(SMOOTH)
@every_dtype
@both_backends
def test_error_is_at_most_twice_that_of_plain_code(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    check_errors(case, dtype, backend, "cuda")


@by_id(EXACT)
@every_dtype
@both_backends
def test_integer_results_equal_the_fp64_reference(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    inputs = case.inputs(dtype)
    truth = case.reference(**cast(inputs, torch.float64))
    found = case.op(**moved(inputs, "cuda"), backend=backend)
    assert found.is_cuda
    assert torch.equal(found.cpu(), truth)


@by_id(CASES)
def test_poisoned_memory_strides_and_repetition_change_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = moved(case.inputs(), "cuda")
    results = []
    for poison in (float("nan"), 1e30, float("nan")):
        # What the allocator hands out next was full of this.
        for size in (1 << 10, 1 << 16, 1 << 22):
            del_me = torch.full((size,), poison, device="cuda")
            del del_me
        results.append(run(case, inputs, "triton"))
    first, first_grads = results[0]
    assert not first.isnan().any()
    for again, again_grads in results[1:]:
        assert torch.equal(first, again)
        for name, grad in first_grads.items():
            assert torch.equal(grad, again_grads[name]), name
            assert not grad.isnan().any()
    bent, _ = run(case, twisted(inputs), "triton")
    if case.exact:
        assert torch.equal(bent, first)
    else:
        torch.testing.assert_close(bent, first, rtol=1e-5, atol=1e-6)


def _normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to("cuda", dtype).requires_grad_()


def _neighborhood(side: int, kernel: int, dilation: int, bias: bool) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, backend: str) -> Tensor:
        out = ops.neighborhood_attention(
            q, k, v, kernel, dilation=dilation, rpb=rpb if bias else None, backend=backend
        )
        assert isinstance(out, Tensor)
        return out + 0 * rpb.sum().to(out.dtype)

    return call


@pytest.mark.parametrize("dim", [24, 32, 64, 128])
@pytest.mark.parametrize(
    ("side", "kernel", "dilation", "bias"),
    [(56, 7, 1, False), (56, 7, 8, True), (65, 13, 1, True), (14, 7, 2, False)],
)
@every_dtype
def test_neighborhood_attention_at_the_sizes_of_models(
    side: int, kernel: int, dilation: int, bias: bool, dim: int, dtype: torch.dtype
) -> None:
    """Triton beside PyTorch in fp64, values and gradients."""
    q, k, v = (_normal(2, side, side, 3, dim, dtype=dtype, seed=i) for i in range(3))
    rpb = _normal(3, 2 * kernel - 1, 2 * kernel - 1, dtype=dtype, seed=3)
    call = _neighborhood(side, kernel, dilation, bias)
    noise = _normal(2, side, side, 3, dim, dtype=dtype, seed=4).detach()

    def results(inputs: list[Tensor], backend: str) -> list[Tensor]:
        out = call(*inputs, backend)
        return [out, *torch.autograd.grad((out * noise.to(out.dtype)).sum(), inputs)]

    leaves = [q, k, v, rpb]
    truth = results([t.detach().double().requires_grad_() for t in leaves], "torch")
    eps = torch.finfo(dtype).eps
    for name, got, want in zip(
        ("out", *"qkv", "rpb"), results(leaves, "triton"), truth, strict=True
    ):
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
        assert error < 4 * eps if dtype != torch.float32 else error < 3e-6, (name, float(error))


def test_picks_of_thousands_of_tokens_are_those_of_the_cpu() -> None:
    x = torch.randn(3, 2880, 256, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 2880, dtype=torch.bool)
    mask[1, 1000:] = False
    given: dict[str, Any] = {"num_keep": torch.tensor([288, 64, 1]), "mask": mask}
    for objective in ("k_center", "max_sum", "dpp"):
        want = ops.greedy_diverse(x, objective=objective, **given)
        there = {key: value.cuda() for key, value in given.items()}
        for backend in ("triton", "torch"):
            got = ops.greedy_diverse(x.cuda(), objective=objective, **there, backend=backend)
            # Sums of another order can swap a near tie, and the order of all that follows it.
            for ours, theirs in zip(got.tolist(), want.tolist(), strict=True):
                kept = set(theirs) - {-1}
                assert len(kept & set(ours)) >= 0.97 * len(kept), (objective, backend)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "neighborhood": lambda x: ops.neighborhood_attention(x, x, x, 3),
    "pair": lambda x: ops.na_av(ops.na_qk(x, x, 3).softmax(-1), x, 3),
    "rows": lambda x: ops.attention_rows(
        x.flatten(1, 2).transpose(1, 2)[:, :, :3], x.flatten(1, 2).transpose(1, 2)
    ),
    "diverse": lambda x: ops.greedy_diverse(x.flatten(1, 3), 4).float(),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_as_one_graph(name: str) -> None:
    x = torch.randn(2, 8, 8, 2, 16, device="cuda")
    torch._dynamo.reset()
    got = torch.compile(CALLS[name], fullgraph=True)(x)
    torch.testing.assert_close(got, CALLS[name](x))


def test_auto_is_triton_and_captures_in_a_cuda_graph() -> None:
    q, k, v = (_normal(2, 16, 16, 2, 32, dtype=torch.bfloat16, seed=i).detach() for i in range(3))
    want = ops.neighborhood_attention(q, k, v, 5, backend="triton")
    assert torch.equal(ops.neighborhood_attention(q, k, v, 5), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.neighborhood_attention(q, k, v, 5)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want)
