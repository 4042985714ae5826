# SPDX-License-Identifier: Apache-2.0
"""ContMix and OverLoCK against the official outputs and counts, and what is beyond them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor

from tests.vit.official import cases, digest, gmacs, load, published, stored
from tests.vit.shrunk import build, images
from visprune import ops
from visprune.backbones.vit import ContMixBlock, OverLoCK
from visprune.backbones.vit.contmix import KernelBias, offset_bias
from visprune.backbones.vit.overlock import checkpoint_filter_fn
from visprune.backbones.vit.overlock_blocks import DynamicConvBlock
from visprune.backbones.vit.overlock_parts import LayerScale
from visprune.errors import ConfigError

VARIANTS = published("overlock")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}
GRAD: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-5}


@pytest.mark.parametrize("case", cases("overlock", block="contmix"), ids=lambda c: c["id"])
def test_official_contmix(case: dict[str, Any]) -> None:
    (tensors, weights), p = stored(case), case["params"]
    block: Any = ContMixBlock(
        p["dim"], p["kernel_size"], p["smk_size"], p["num_heads"], p["mlp_ratio"],
        p["ls_init_value"], p["res_scale"],
    )  # fmt: skip
    load(block, weights)
    x = tensors["x"].requires_grad_()
    out = block(x)
    torch.testing.assert_close(out, tensors["out"], **CLOSE)
    of = (x, block.rpb1, block.rpb2, block.weight_proj.weight)
    for name, grad in zip(
        ("grad_x", "grad_rpb1", "grad_rpb2", "grad_weight_proj"),
        torch.autograd.grad(out, of, tensors["cotangent"]),
        strict=True,
    ):
        torch.testing.assert_close(grad, tensors[name], **GRAD, msg=name)
    with torch.no_grad():
        for _ in range(2):  # the second with the bias that was kept
            torch.testing.assert_close(block(x), tensors["out"], **CLOSE)
        merged = reparameterize_model(block)
        assert sum(p.numel() for p in merged.parameters()) < sum(
            p.numel() for p in block.parameters()
        )
        torch.testing.assert_close(merged(x), tensors["out"], **CLOSE)


@pytest.mark.parametrize("case", cases("overlock", block="dynamic"), ids=lambda c: c["id"])
def test_official_dynamic_block(case: dict[str, Any]) -> None:
    (tensors, weights), p = stored(case), case["params"]
    block = DynamicConvBlock(
        p["dim"], p["ctx_dim"], p["num_heads"], p["kernel_size"], p["smk_size"], p["mlp_ratio"],
        p["ls_init_value"], p["res_scale"], 0.0, p["is_first"], p["is_last"], False, {},
    )  # fmt: skip
    load(block, weights)
    x, h_x = tensors["x"].requires_grad_(), tensors["h_x"].requires_grad_()
    got = block(x, h_x, tensors["h_r"])
    out = got if p["is_last"] else got[0]
    torch.testing.assert_close(out, tensors["out"], **CLOSE)
    loss = (out * tensors["cotangent"]).sum()
    if not p["is_last"]:
        torch.testing.assert_close(got[1], tensors["out_ctx"], **CLOSE)
        loss = loss + got[1].square().sum()
    grads = torch.autograd.grad(loss, (x, h_x))
    torch.testing.assert_close(grads[0], tensors["grad_x"], **GRAD)
    torch.testing.assert_close(grads[1], tensors["grad_h_x"], **GRAD)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", cases("overlock", block="model"), ids=lambda c: c["id"])
def test_official_model(case: dict[str, Any], merged: bool) -> None:
    (tensors, weights), p = stored(case), case["params"]
    model: Any = OverLoCK(
        embed_dims=p["embed_dim"], depths=p["depth"], sub_depths=p["sub_depth"],
        kernel_sizes=p["kernel_size"], mlp_ratios=p["mlp_ratio"], sub_heads=p["sub_num_heads"],
        sub_mlp_ratios=p["sub_mlp_ratio"], projection=p["projection"],
        num_classes=p["num_classes"],
    )  # fmt: skip
    load(model, weights)
    model = reparameterize_model(model) if merged else model
    with torch.no_grad():
        x = tensors["x"]
        before = model.run_stage(1, model.run_stage(0, x))
        base, context = model.overview(before)
        torch.testing.assert_close(before, tensors["mid_pre"], **CLOSE)
        torch.testing.assert_close(base, tensors["mid_base_x"], **CLOSE)
        torch.testing.assert_close(context, tensors["mid_base_ctx"], **CLOSE)
        torch.testing.assert_close(model(x), tensors["out"], **CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_names_and_counts(name: str) -> None:
    model, want = timm.create_model(name, device="meta").eval(), VARIANTS[name]
    assert sum(p.numel() for p in model.parameters()) == want["parameters"]
    assert digest(model) == (want["keys"], want["sha256"])
    scaled = 0  # the official layer scale is a convolution, and counts

    def add(module: LayerScale, args: Any, out: Tensor) -> None:
        nonlocal scaled
        scaled += out.numel()

    for module in model.modules():
        if isinstance(module, LayerScale):
            module.register_forward_hook(add)
    own = gmacs(model, 224)
    assert own + scaled / 1e9 == pytest.approx(want["gmacs"], abs=5e-4)
    assert scaled / 1e9 < 0.001 * own


@pytest.mark.parametrize(
    ("name", "params"),
    [("xt", 16_453_712), ("t", 33_467_040), ("s", 56_156_452), ("b", 94_942_528)],
)
def test_without_the_head_of_the_context(name: str, params: int) -> None:
    model = timm.create_model(f"overlock_{name}_reparam", aux_head=False, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(("kernel", "size"), [(5, (5, 9)), (7, (14, 10)), (4, (6, 5))])
def test_the_bias_is_that_of_neighborhood_attention(kernel: int, size: tuple[int, int]) -> None:
    rpb = torch.randn(3, 2 * kernel - 1, 2 * kernel - 1)
    nothing = torch.zeros(1, *size, 3, 1)
    want = ops.na_qk(nothing, nothing, kernel, rpb=rpb)[0]
    assert torch.equal(offset_bias(rpb, *size), want)


def test_a_kept_bias_follows_its_parameters() -> None:
    block = ContMixBlock(16).eval()
    x = torch.randn(1, 16, 9, 8)

    def fresh() -> Tensor:
        with torch.enable_grad():
            return block(x).detach()

    with torch.no_grad():
        for change in (
            lambda: block.rpb2.add_(1.0 * torch.randn_like(block.rpb2)),
            lambda: block.rpb1.data.mul_(-2),
            lambda: block.weight_proj.bias.data.normal_(),
            lambda: block.load_state_dict(ContMixBlock(16).state_dict()),
        ):
            before = block(x)
            torch.testing.assert_close(block(x), fresh())
            change()
            torch.testing.assert_close(block(x), fresh())
            assert not torch.allclose(block(x), before)
        for width in range(7, 30):
            block(torch.randn(1, 16, 7, width))
        assert len(block.kept.found) == 8
        again = pickle.loads(pickle.dumps(block))
        assert not again.kept.found
        assert not copy.deepcopy(block).kept.found
        assert torch.equal(again(x), block(x))


@pytest.mark.parametrize("name", ["overlock_xt", "overlock_t_reparam"])
def test_autocast_and_half(name: str) -> None:
    model, x = build(name), images()
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
    assert (got.float() - want).norm() < 0.1 * want.norm()


def test_the_head_of_the_context_is_trained_on_request() -> None:
    model, x = build("overlock_xt").train(), images()
    assert isinstance(model(x), Tensor)
    out = model.forward_train(x)
    assert out.logits.shape == out.aux.shape == (2, 5)
    (out.logits.square().sum() + 0.4 * out.aux.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    without = build("overlock_xt", aux_head=False)
    with pytest.raises(ConfigError, match="aux_head=True"):
        without.forward_train(x)


def test_files_of_both_forms() -> None:
    trained, x = build("overlock_xt"), images()
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        want = trained(x)
        merged = build("overlock_xt_reparam", aux_head=False, seed=1)
        merged.load_state_dict(checkpoint_filter_fn(trained.state_dict(), merged))
        torch.testing.assert_close(merged(x), want, rtol=1e-4, atol=1e-4)
        again = build("overlock_xt_reparam", seed=2)
        whole = reparameterize_model(trained)
        again.load_state_dict(checkpoint_filter_fn({"model": whole.state_dict()}, again))
        assert torch.equal(again(x), whole(x))
    with pytest.raises(ConfigError, match="merged form cannot be taken apart"):
        checkpoint_filter_fn(whole.state_dict(), trained)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"large kernel is one of 5, 7, .*; got 6"):
        ContMixBlock(16, 6)
    with pytest.raises(ConfigError, match=r"small kernel must be 2 to kernel_size = 7; got 9"):
        ContMixBlock(16, 7, 9)
    with pytest.raises(ConfigError, match=r"multiple of 4 \* num_heads"):
        ContMixBlock(20, num_heads=2)
    with pytest.raises(ConfigError, match=r"takes maps \[B, 16, H, W\]; got \[1, 9, 9, 16\]"):
        ContMixBlock(16)(torch.randn(1, 9, 9, 16))
    with pytest.raises(ConfigError, match="four stages"):
        build("overlock_xt", depths=(1, 1))
    assert issubclass(ContMixBlock, KernelBias)
