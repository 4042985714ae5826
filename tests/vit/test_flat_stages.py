# SPDX-License-Identifier: Apache-2.0
"""timm's manners of the backbones with flat names: features, pruning, pooling, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters

from tests.vit.shrunk import DISTINCT, FLAT, build, images, small_kwargs
from visprune.backbones.vit.contmix import KernelBias
from visprune.errors import ConfigError

FEW = [n for n in DISTINCT if n in FLAT]


def channels(name: str) -> list[int]:
    return [16, 32, 64, 160 if name.startswith("overlock") else 128]


@pytest.mark.parametrize("name", FLAT)
def test_intermediates_are_the_stages(name: str) -> None:
    model, x = build(name), images()
    with torch.no_grad():
        final, found = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        assert [f.shape[1] for f in found] == channels(name)
        assert [tuple(f.shape[2:]) for f in found] == [(16, 16), (8, 8), (4, 4), (2, 2)]
        assert [i["num_chs"] for i in model.feature_info] == channels(name)
        assert [i["reduction"] for i in model.feature_info] == [4, 8, 16, 32]
        assert all(i["module"] in dict(model.named_modules()) for i in model.feature_info)
        early, two = model.forward_intermediates(
            x, indices=[0, 1], stop_early=True, output_fmt="NHWC"
        )
        assert torch.equal(two[1].permute(0, 3, 1, 2), found[1])
        assert torch.equal(early, found[1])
        (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        assert torch.equal(last, found[3])


@pytest.mark.parametrize("name", FEW)
def test_features_only_prunes_what_is_behind(name: str) -> None:
    kwargs = {k: v for k, v in small_kwargs(name).items() if k != "num_classes"}
    net: Any = timm.create_model(name, features_only=True, out_indices=(0, 2), **kwargs).eval()
    with torch.no_grad():
        found = net(images())
    assert [tuple(f.shape) for f in found] == [(2, 16, 16, 16), (2, 64, 4, 4)]
    assert net.feature_info.reduction() == [4, 16]
    left = {n.split(".")[0] for n, _ in net.model.named_parameters()}
    assert not any(part.endswith("head") or part.endswith("x") for part in left)
    assert not left & set(net.model.stage_parts[3])
    whole = build(name)
    whole.load_state_dict(net.model.state_dict(), strict=False)
    with torch.no_grad():
        want = whole.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
        assert torch.equal(net.model(images()), want[1])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    everything = build(name)
    assert everything.prune_intermediate_layers(1, prune_head=False) == [3]
    with torch.no_grad():
        assert everything(images()).shape == (2, 5)


@pytest.mark.parametrize("name", FEW)
def test_pooling(name: str) -> None:
    model, x = build(name, num_classes=0), images()
    with torch.no_grad():
        maps = model.forward_features(x).flatten(2)
        mean, largest = maps.mean(2), maps.amax(2)
        for pool, want in {
            "avg": mean,
            "max": largest,
            "avgmax": 0.5 * (mean + largest),
        }.items():
            model.reset_classifier(0, pool)
            torch.testing.assert_close(model(x), want)
    with pytest.raises(ConfigError, match="global_pool"):
        model.reset_classifier(0, "token")
    with pytest.raises(ConfigError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", FEW)
def test_layers_are_ordered_from_input_to_output(name: str) -> None:
    model = build(name)
    group = group_parameters(model, model.group_matcher(), reverse=True)
    first = [min(g for n, g in group.items() if n.startswith(f"{part}."))
             for stage in model.stage_parts for part in stage]  # fmt: skip
    assert first == sorted(first)
    assert group["head.weight" if "head.weight" in group else "head.4.weight"] >= first[-1]


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("size", [(33, 70), (96, 64)])
def test_other_sizes(name: str, size: tuple[int, int]) -> None:
    model = build(name)
    with torch.no_grad():
        model.set_input_size(size)
        found = model.forward_intermediates(images(1, *size), intermediates_only=True)
        assert [f.shape[2] for f in found] == [-(-size[0] // 4 // 2**i) if size[0] % 32 == 0 else
                                               [9, 5, 3, 2][i] for i in range(4)]  # fmt: skip
        assert torch.isfinite(model(images(1, *size))).all()


@pytest.mark.parametrize("name", FEW)
def test_wrong_images_and_other_channels(name: str) -> None:
    model = build(name)
    for x in (torch.randn(1, 4, 64, 64), torch.randn(3, 64, 64)):
        with pytest.raises(ConfigError, match=r"takes images \[B, 3, H, W\]"):
            model(x)
    assert build(name, in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def transposed(side: int) -> torch.Tensor:
    """Positions of a square, column by column."""
    return torch.arange(side * side).view(side, side).t().flatten()


@pytest.mark.parametrize("name", FEW)
def test_a_rectangle_turned_is_the_result_turned(name: str) -> None:
    model, turned = build(name).double(), build(name).double()
    with torch.no_grad():
        for key, parameter in turned.named_parameters():
            if parameter.ndim == 4 or "rpb" in key:
                parameter.copy_(parameter.transpose(-1, -2).clone())
        for module in turned.modules():
            if isinstance(module, KernelBias):
                places = torch.cat([transposed(module.small), 25 + transposed(module.large)])
                weight, bias = module.weight_proj.weight, module.weight_proj.bias
                weight.copy_(weight[places][:, transposed(7)].clone())
                bias.copy_(bias[places].clone())
        x = images(1, 64, 96).double()
        want = model.forward_features(x)
        got = turned.forward_features(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(got, want)
