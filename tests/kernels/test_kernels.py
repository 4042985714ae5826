# SPDX-License-Identifier: Apache-2.0
"""One test over every kernel folder and every case of its ``cases.py``."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visprune.kernels.common.spec import Case, Inputs, cast, errors

FOLDER = Path(__file__).parents[2] / "kernels"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/cases.py"))
MODULES = {name: importlib.import_module(f"visprune.kernels.{name}.cases") for name in NAMES}
# A folder written for this test holds `Case`s; others bring a test file of their own.
CASES = {
    f"{name}-{case.name}": case
    for name in NAMES
    for case in getattr(MODULES[name], "CASES", ())
    if isinstance(case, Case)
}
EXACT = {key: case for key, case in CASES.items() if case.exact}
SMOOTH = {key: case for key, case in CASES.items() if not case.exact}
DRAWS = 8  # of inputs, where the first ones break the rule
# Errors are held to those of plain code, whose products of a matrix and a vector are nearly exact
# with AVX-512. On Intel they are taken where all sums run on AVX2, as on other makers' processors:
# in a process of its own, since MKL and OpenBLAS (NumPy's: Triton's interpreter) read it once.
ON_AVX2 = {"MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def by_id(cases: dict[str, Case]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(c, id=key) for key, c in cases.items()])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN (integers: the largest), and nothing random is allowed."""
    torch.use_deterministic_algorithms(True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)


def twisted(inputs: Inputs) -> Inputs:
    """The same values in non-contiguous memory."""
    out = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim >= 2:
            wide = torch.stack((value, torch.zeros_like(value)), -1)
            out[key] = wide.mT.contiguous().mT[..., 0]
    return out


def run(case: Case, inputs: Inputs, backend: str = "torch") -> tuple[Tensor, dict[str, Tensor]]:
    """Result and gradients of a fixed random projection of it."""
    leaves = {
        name: inputs[name].detach().clone().requires_grad_()
        for name in case.grads
        if inputs[name] is not None
    }
    call = {**inputs, **leaves}
    out = case.reference(**call) if backend == "reference" else case.op(**call, backend=backend)
    if not leaves:
        return out, {}
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * noise.to(out)).sum(), list(leaves.values()))
    return out.detach(), dict(zip(leaves, grads, strict=True))


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same inputs with their tensors on ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def check_errors(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """The 2x rule: error against fp64 at most twice that of the plain code in the same dtype.

    Of one draw of a small case plain code may be exact to the last bit by luck, on one processor
    and not on the next. Where a draw breaks the rule it is held over more: the worst of each.
    """
    worst: dict[str, list[float]] = {}
    for seed in range(DRAWS):
        broken = {}
        for name, found in _errors_of(case, dtype, backend, device, seed).items():
            known = worst.setdefault(name, [0.0] * 3)
            worst[name] = known = [max(pair) for pair in zip(known, found, strict=True)]
            ours, allowed, floor = known
            if ours > 2 * allowed + floor:
                broken[name] = (ours, allowed)
        if not broken:
            return
    raise AssertionError(f"error over {DRAWS} draws, and that of plain code: {broken}")


def _errors_of(
    case: Case, dtype: torch.dtype, backend: str, device: str, seed: int
) -> dict[str, tuple[float, float, float]]:
    """By result and statistic: our error, that of plain code, and what rounding takes at least."""
    inputs = moved(case.inputs(dtype, seed), device)
    truth, truth_grads = run(case, cast(inputs, torch.float64), "reference")
    plain, plain_grads = run(case, inputs, "reference")
    got, got_grads = run(case, inputs, backend)
    eps = torch.finfo(dtype).eps
    pairs = [("out", truth, plain, got)]
    pairs += [(n, truth_grads[n], plain_grads[n], got_grads[n]) for n in truth_grads]
    made = {}
    for name, t, p, g in pairs:
        assert g.shape == t.shape, name
        floor = eps * max(1.0, float(t.abs().max()) if t.numel() else 0.0)
        for kind, ours, allowed in zip(("max", "rms"), errors(g, t), errors(p, t), strict=True):
            assert ours == ours, (name, "is not finite")
            made[f"{name} {kind}"] = (ours, allowed, floor)
    return made


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Integer results equal those in fp64, from any memory; other errors keep the 2x rule."""
    if not case.exact:
        check_errors(case, dtype, backend)
        return
    inputs = case.inputs(dtype)
    truth = case.reference(**cast(inputs, torch.float64))
    assert torch.equal(case.op(**inputs, backend=backend), truth)
    assert torch.equal(case.op(**twisted(inputs), backend=backend), truth)


Apart = Callable[[str, str, str], str]


@contextmanager
def process_apart(**variables: str) -> Iterator[Apart]:
    """``ask(case, dtype, backend)`` of ``errors_apart.py`` -> what is wrong, or nothing."""
    info = Path("/proc/cpuinfo")
    intel = info.exists() and "GenuineIntel" in info.read_text(encoding="utf-8", errors="replace")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(ON_AVX2 if intel else {}), **variables}
    script = Path(__file__).with_name("errors_apart.py")
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        asked, told = process.stdin, process.stdout

        def ask(key: str, dtype: str, backend: str) -> str:
            print(json.dumps([key, dtype, backend]), file=asked, flush=True)
            said = told.readline()
            assert said, "the process has ended"
            return str(json.loads(said))

        yield ask


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with process_apart() as ask:
        yield ask


def test_every_folder_with_cases_is_covered() -> None:
    assert {"greedy_diverse", "attention_rows", "reduce_tokens"} <= set(NAMES)
    assert {key.split("-")[0] for key in CASES} >= {"greedy_diverse", "attention_rows"}


@pytest.mark.parametrize("key", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_code(key: str, dtype: str, apart: Apart) -> None:
    assert not apart(key, dtype, "torch")


@by_id(EXACT)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_integer_results_equal_the_fp64_reference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "torch")


@by_id(CASES)
@pytest.mark.usefixtures("poisoned")
def test_poisoned_memory_strides_and_repetition_change_nothing(case: Case) -> None:
    inputs = case.inputs()
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    first, first_grads = run(case, inputs)
    again, again_grads = run(case, inputs)
    assert torch.equal(first, again)
    assert not first.isnan().any()
    for name, grad in first_grads.items():
        assert torch.equal(grad, again_grads[name])
        assert not grad.isnan().any()
    assert all(torch.equal(inputs[k], v) for k, v in before.items()), "an input was written to"
    bent, _ = run(case, twisted(inputs))
    if case.exact:
        assert torch.equal(bent, first)
    else:
        torch.testing.assert_close(bent, first, rtol=1e-5, atol=1e-6)


@by_id(SMOOTH)
def test_gradcheck(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    names = [n for n in case.grads if inputs[n] is not None]
    leaves = [inputs[n].requires_grad_() for n in names]

    def call(*values: Tensor) -> Tensor:
        return case.op(**{**inputs, **dict(zip(names, values, strict=True))}, backend="torch")

    if sum(leaf.numel() for leaf in leaves):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@by_id(SMOOTH)
def test_gradients_of_gradients(case: Case) -> None:
    """A gradient penalty, a Hessian: the gradients have all orders."""
    inputs = case.inputs(torch.float64)
    names = [n for n in case.grads if inputs[n] is not None]
    leaves = [inputs[n].requires_grad_() for n in names]

    def call(*values: Tensor) -> Tensor:
        return case.op(**{**inputs, **dict(zip(names, values, strict=True))}, backend="torch")

    if sum(leaf.numel() for leaf in leaves):
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves)
        again = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        for a, b in zip(again, first, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-9, atol=1e-9)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


OPCHECKED = (
    "greedy_diverse-k_center_ragged",
    "greedy_diverse-dpp",
    "attention_rows-rows_gqa_mean",
    "attention_rows-columns_causal",
    "reduce_tokens-pairs",
    "reduce_tokens-gather",
    "reduce_tokens-match_class",
)


@pytest.mark.parametrize("key", OPCHECKED)
def test_opcheck(key: str) -> None:
    case = CASES[key]
    inputs = case.inputs()
    for name in case.grads:
        inputs[name].requires_grad_()
    torch.library.opcheck(case.op, (), {**inputs, "backend": "torch"})


NO_WORK = {
    *("keep_none", "no_tokens", "no_images", "no_images_groups", "no_entries", "gather"),
    "match_none",
    *("rows_no_rows", "rows_no_keys", "columns_no_rows"),
    *("hilo_no_images", "hilo_no_rows", "index_no_queries", "index_no_keys", "index_of_nothing"),
    *("blocks_none", "blocks_no_queries", "topk_no_rows", "topk_no_rank"),
    *("ragged_no_slots", "ragged_no_queries", "ragged_no_batch", "codes_no_slots"),
}


@by_id(CASES)
def test_flops_are_counted_and_fake_shapes_agree(case: Case) -> None:
    inputs = case.inputs()
    with FlopCounterMode(display=False) as counter:
        real = case.op(**inputs, backend="torch")
    assert (counter.get_total_flops() > 0) == (case.name not in NO_WORK)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_in = {
            k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()
        }
        fake = case.op(**fake_in, backend="torch")
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype


def test_the_triton_source_runs_in_the_interpreter() -> None:
    """Every small case through the real Triton code; the variable is read at import."""
    with process_apart(TRITON_INTERPRET="1") as ask:
        said = {key: ask(key, "fp32", "triton") for key, case in CASES.items() if case.triton}
    assert said
    assert not any(said.values()), {key: what for key, what in said.items() if what}
