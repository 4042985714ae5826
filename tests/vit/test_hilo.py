# SPDX-License-Identifier: Apache-2.0
"""``HiLo`` and token merging against the official outputs, counts, and torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from visprune.backbones.vit import HiLo
from visprune.backbones.vit.token_merging import DeformConv2x2
from visprune.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "hilo"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def module(p: dict[str, Any]) -> HiLo:
    return HiLo(p["dim"], p["num_heads"], p["window_size"], p["alpha"], p["qkv_bias"])


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda c: c["id"])
def test_official_outputs(case: dict[str, Any]) -> None:
    stored, p = load_file(GOLDEN / case["file"]), case["params"]
    hilo = module(p)
    weights = {n.removeprefix("w."): stored[n] for n in case["inputs"] if n.startswith("w.")}
    hilo.load_state_dict(weights)  # strict: the published names, and no other
    assert (hilo.l_heads, hilo.h_heads) == (p["l_heads"], p["h_heads"])
    x = stored["x"].view(p["B"], p["H"], p["W"], p["dim"]).requires_grad_()
    out = hilo(x)
    torch.testing.assert_close(out.flatten(1, 2), stored["out"], rtol=1e-5, atol=2e-6)
    (grad,) = torch.autograd.grad(out.flatten(1, 2), x, stored["cotangent"])
    torch.testing.assert_close(grad.flatten(1, 2), stored["grad_x"], rtol=1e-4, atol=1e-5)
    if "macs_formula" in p:
        assert hilo.macs(p["H"], p["W"]) == p["macs_formula"]


def counted(model: torch.nn.Module, *shape: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("size", [(14, 14), (8, 12)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("window", [1, 2])
def test_the_counter_agrees_with_the_formula(
    window: int, alpha: float, size: tuple[int, int]
) -> None:
    hilo = HiLo(64, 4, window, alpha)
    assert counted(hilo, 1, *size, 64) == hilo.macs(*size)


def test_published_counts() -> None:
    # README of ziplab/LITv2, and the table of HubHop/vit-attention-benchmark.
    assert HiLo(384, 12, 2, 0.5).macs(14, 14) == 83_467_776
    hilo = HiLo(768, 12, 2, 0.9, qkv_bias=True)
    assert sum(p.numel() for p in hilo.parameters()) == 2_198_528
    assert round(hilo.macs(14, 14) / 1e6, 2) == 298.30
    assert HiLo(64, 4, 2, 0.5).macs(7, 10) == HiLo(64, 4, 2, 0.5).macs(8, 10)


def test_plain_attention_is_a_special_case() -> None:
    # window_size 1: no pooling, every head sees every pixel.
    torch.manual_seed(0)
    hilo = HiLo(24, 3, 1, 0.2, qkv_bias=True)
    x = torch.randn(2, 5, 7, 24)
    q = hilo.l_q(x).view(2, 35, 3, 8).transpose(1, 2)
    k, v = hilo.l_kv(x).view(2, 35, 2, 3, 8).permute(2, 0, 3, 1, 4)
    want = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    want = hilo.l_proj(want.transpose(1, 2).reshape(2, 5, 7, 24))
    torch.testing.assert_close(hilo(x), want)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        HiLo(30, 4)
    with pytest.raises(ConfigError, match=r"alpha in 0\.\.1"):
        HiLo(32, 4, alpha=1.5)
    with pytest.raises(ConfigError, match="window_size"):
        HiLo(32, 4, window_size=0)
    with pytest.raises(ConfigError, match=r"\[B, H, W, 32\]"):
        HiLo(32, 4)(torch.randn(2, 49, 32))


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (2, 2)])
def test_deformable_convolution_is_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = DeformConv2x2(3, 5).double()
    x = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
    start = torch.nn.functional.conv2d(x, ours.weight, ours.bias, stride=2)
    torch.testing.assert_close(ours(x), start, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        ours.conv_offset.weight.normal_()  # offsets of whole pixels, and out of the map
        ours.conv_offset.bias.normal_()
    offset = ours.conv_offset(x)
    want = deform_conv2d(x, offset, ours.weight, ours.bias, stride=2)
    out = ours(x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(want)
    inputs = [x, *ours.parameters()]
    for a, b in zip(
        torch.autograd.grad(out, inputs, weights), torch.autograd.grad(want, inputs, weights),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_deformable_convolution_in_half_precision() -> None:
    torch.manual_seed(0)
    wide = DeformConv2x2(8, 8)
    x = torch.randn(1, 8, 12, 12)
    low = DeformConv2x2(8, 8, dtype=torch.bfloat16)
    low.load_state_dict(wide.state_dict())
    out = low(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wide(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [(14, 14), (7, 10)])
@pytest.mark.parametrize(("window", "alpha"), [(1, 0.5), (2, 0.0), (2, 0.5), (2, 1.0)])
def test_who_listens_to_a_projection_hears_it(
    window: int, alpha: float, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    hilo = HiLo(64, 4, window, alpha, qkv_bias=True)
    x = torch.randn(2, *size, 64)
    want = hilo(x)
    heard: list[str] = []
    for name, part in hilo.named_children():
        part.register_forward_hook(lambda *_, name=name: heard.append(name))
    got = hilo(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert {*heard} == {name for name, _ in hilo.named_children()}


def test_what_stands_in_the_place_of_a_projection_is_run() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    hilo = HiLo(64, 4, 2, 0.5)
    x = torch.randn(1, 4, 4, 64)
    plain = hilo(x)
    swapped = Doubled(hilo.h_dim, hilo.h_dim)
    swapped.load_state_dict(hilo.h_proj.state_dict())
    hilo.h_proj = swapped
    got = hilo(x)
    torch.testing.assert_close(got[..., : hilo.h_dim], 2 * plain[..., : hilo.h_dim])
    torch.testing.assert_close(got[..., hilo.h_dim :], plain[..., hilo.h_dim :])
