# SPDX-License-Identifier: Apache-2.0
"""VAN and large kernel attention against the official outputs and counts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from tests.vit.official import cases, digest, gmacs, load, published, stored
from tests.vit.shrunk import build, images
from visprune.backbones.vit import VAN, LargeKernelAttention
from visprune.backbones.vit.van import Attention, VANBlock, checkpoint_filter_fn
from visprune.errors import ConfigError

VARIANTS = published("van")
MODULES = {"LKA": LargeKernelAttention, "Attention": lambda dim: Attention(dim, {})}


@pytest.mark.parametrize("case", cases("lka") + cases("van", block="block"), ids=lambda c: c["id"])
def test_official_modules(case: dict[str, Any]) -> None:
    (tensors, weights), p = stored(case), case["params"]
    if p["block"] == "block":
        module: Any = VANBlock(p["dim"], p["mlp_ratio"], 0.0, 0.0, {})
    else:
        module = MODULES[p["block"]](p["dim"])
    load(module, weights)
    x = tensors["x"].requires_grad_()
    out = module(x)
    atol = 1e-5 if p["block"] == "block" else 2e-6
    torch.testing.assert_close(out, tensors["out"], rtol=1e-5, atol=atol)
    (grad,) = torch.autograd.grad(out, x, tensors["cotangent"])
    torch.testing.assert_close(grad, tensors["grad_x"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", cases("van", block="model"), ids=lambda c: c["id"])
def test_official_model(case: dict[str, Any]) -> None:
    tensors, weights = stored(case)
    names = ("embed_dims", "mlp_ratios", "depths", "num_classes")
    model: Any = load(VAN(**{name: case["params"][name] for name in names}), weights)
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        final, maps = model.forward_intermediates(tensors["x"])
        for i in range(3):
            torch.testing.assert_close(maps[i], tensors[f"stage{i + 1}"], **close)
        pooled = model.forward_head(final, pre_logits=True)
        torch.testing.assert_close(pooled, tensors["features"], **close)
        torch.testing.assert_close(model(tensors["x"]), tensors["out"], **close)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_names_and_counts(name: str) -> None:
    model, want = timm.create_model(name, device="meta").eval(), VARIANTS[name]
    assert sum(p.numel() for p in model.parameters()) == want["parameters"]
    assert digest(model) == (want["keys"], want["sha256"])
    assert gmacs(model, 224) == pytest.approx(want["gmacs"], abs=5e-4)


def test_an_official_file() -> None:
    model, other = build("van_b0"), build("van_b0", seed=1)
    file = {"state_dict": {f"module.{n}": v for n, v in model.state_dict().items()}}
    other.load_state_dict(checkpoint_filter_fn(file, other))
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="four stages; got"):
        build("van_b0", depths=(1, 1))
    with pytest.raises(ConfigError, match="fixed stride of 4"):
        build("van_b0").set_input_size(patch_size=8)
