# SPDX-License-Identifier: Apache-2.0
"""In bf16 a pruned run is as near to what it should say as the oracle with hidden keys itself is.

Both are compared with the oracle in fp32, whose weights and pixels were rounded to bf16 too: what
is left is the rounding of the products alone, and the untouched model's code has as much of it. All
run the same kernel (eager): another one rounds otherwise, and sends a token to other experts.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract.oracle import alive, forwards
from tests.families.claimed import CLAIMED, inputs
from tests.families.oracle import gone_logits

Inputs = dict[str, Any]
NOISY = ("chameleon", "chameleon_swin", "apertus1p5", "emu3", "muse_spark")
BOTH = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "qwen3_5", "smolvlm")


def cast(made: Inputs, dtype: torch.dtype) -> Inputs:
    """Pixels and what else is a fraction."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}


def rms(difference: Tensor) -> float:
    """Root of the mean square, which swings less from kernel to kernel than the largest does."""
    return float(difference.double().square().mean().sqrt())


@pytest.mark.parametrize("family", CLAIMED)
@torch.no_grad()
def test_bf16_is_within_the_noise_of_the_oracle(family: str, models: Any) -> None:
    half = copy.deepcopy(models(family, "eager")).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    prompt = cast(inputs(family, [[3, "a", 6]]), torch.bfloat16)
    whole = cast(prompt, torch.float32)
    for name in ("random", "fastv") if family in BOTH else ("random",):
        with forwards() as seen, visprune.prune(half, name, num_keep=3, positions="original"):
            logits = half(**prompt).logits
        keep = alive(seen[0])
        there = keep[-1]
        truth = gone_logits(family, exact, whole, keep)[there]
        said = truth.abs() < 1e30  # words that Chameleon never says lie at the dtype's least
        oracle = gone_logits(family, half, prompt, keep)[there]
        noise = rms((oracle - truth)[said])
        assert rms((logits[there] - truth)[said]) <= 2 * noise
        assert rms((logits[there] - oracle)[said]) <= noise
        # Where noise is as large as what is said, the bounds above hold little; these are named.
        assert (noise < 0.2 * rms(truth[said])) == (family not in NOISY)
