# SPDX-License-Identifier: Apache-2.0
"""``hilo_layer`` against the stored outputs and gradients of the official HiLo module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from visprune import ops

GOLDEN = Path(__file__).parents[1] / "golden" / "hilo"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
NAMES = ("h_qkv", "h_proj", "l_q", "l_kv", "l_proj")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_hilo(case: dict[str, Any]) -> None:
    stored, p = load_file(GOLDEN / case["file"]), case["params"]
    projections = {
        name: (stored[f"w.{name}.weight"], stored.get(f"w.{name}.bias"))
        for name in NAMES
        if f"w.{name}.weight" in stored
    }
    x = stored["x"].unflatten(1, (p["H"], p["W"])).requires_grad_()
    head_dim = p["dim"] // p["num_heads"]
    with FlopCounterMode(display=False) as counter:
        out = ops.hilo_layer(x, head_dim, window_size=p["window_size"], **projections)
    out = out.flatten(1, 2)
    torch.testing.assert_close(out, stored["out"], rtol=1e-5, atol=2e-6)
    (grad,) = torch.autograd.grad((out * stored["cotangent"]).sum(), x)
    torch.testing.assert_close(grad.flatten(1, 2), stored["grad_x"], rtol=1e-4, atol=1e-5)
    if "macs_formula" in p:  # of the published flops(): one multiply-add is two operations
        assert counter.get_total_flops() == 2 * p["macs_formula"] * p["B"]
