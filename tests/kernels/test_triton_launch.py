# SPDX-License-Identifier: Apache-2.0
"""The launch of a Triton kernel that does not fit, and the precision of fp32 products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from visprune.kernels.common.triton_launch import launch, precision


class Kernel:
    """Runs with at most ``fits`` stages, as a device with little shared memory would have it."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.tried: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, num_stages: int, **options: Any) -> None:
            self.tried.append(num_stages)
            if num_stages > self.fits:
                raise OutOfResources(200_000, 100_000, "shared memory")

        return run


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_a_kernel_that_does_not_fit_gets_fewer_stages_and_keeps_them() -> None:
    kernel, x = Kernel(fits=1), torch.zeros(1)
    launch(kernel, (1,), x, num_warps=4)
    launch(kernel, (1,), x, num_warps=4)
    assert kernel.tried == [3, 2, 1, 1]
    launch(kernel, (1,), x, num_warps=8)  # compiled apart, so it is found apart
    assert kernel.tried[4:] == [3, 2, 1]


def test_a_kernel_that_fits_nowhere_says_so() -> None:
    with pytest.raises(OutOfResources, match="shared memory"):
        launch(Kernel(fits=0), (1,), torch.zeros(1))


@pytest.mark.parametrize(
    ("asked", "products"), [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")]
)
def test_products_of_fp32_follow_pytorch(asked: str, products: str) -> None:
    torch.set_float32_matmul_precision(asked)
    assert precision(torch.float32) == products
    assert precision(torch.bfloat16) == "tf32"


def test_the_newer_setting_of_pytorch_counts_too() -> None:
    torch.set_float32_matmul_precision("highest")
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix"):  # PyTorch's answer to the older question
            torch.get_float32_matmul_precision()
        assert precision(torch.float32) == "tf32x3"
    finally:
        products.fp32_precision = before
