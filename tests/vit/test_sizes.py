# SPDX-License-Identifier: Apache-2.0
"""Image sizes: what may change, what is padded, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.vit.shrunk import DISTINCT, STAGED, build, images
from visprune.errors import ConfigError


@pytest.mark.parametrize("name", STAGED)
def test_another_size_and_a_rectangle(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        model.set_input_size((96, 128))
        assert model(images(1, 96, 128)).shape == (1, 5)
        assert model.forward_features(images(1, 96, 128)).shape == (1, 3, 4, 128)


@pytest.mark.parametrize("name", [n for n in DISTINCT if n in STAGED])
def test_a_rectangle_turned_is_the_result_turned(name: str) -> None:
    # No layer prefers a direction once its kernels are turned too.
    model, turned = build(name), build(name)
    with torch.no_grad():
        for parameter in turned.parameters():
            if parameter.ndim == 4 and parameter.shape[-1] == parameter.shape[-2]:
                parameter.copy_(parameter.transpose(2, 3).clone())
            elif parameter.ndim == 3:  # position biases
                parameter.copy_(parameter.transpose(1, 2).clone())
        for module in turned.modules():
            if hasattr(module, "conv_offset"):  # (dy, dx) per tap, taps in raster order
                for tensor in (module.conv_offset.weight, module.conv_offset.bias):
                    pairs = tensor.view(2, 2, 2, *tensor.shape[1:]).transpose(0, 1).flip(2)
                    tensor.copy_(pairs.reshape(tensor.shape).clone())
        x = images(1, 64, 96)
        want = model.forward_features(x)
        got = turned.forward_features(x.transpose(2, 3)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["nat_small", "dinat_large_384_11x11"])
@pytest.mark.parametrize("size", [(1, 1), (9, 33), (50, 70)])
def test_nat_takes_any_size(name: str, size: tuple[int, int]) -> None:
    model = build(name)
    with torch.no_grad():
        assert torch.isfinite(model(images(1, *size))).all()
    with pytest.raises(ConfigError, match="fixed stride"):
        model.set_input_size(patch_size=8)


@pytest.mark.parametrize("name", ["litv2_s", "litv2_b_384"])
def test_litv2_refuses_what_it_cannot_divide(name: str) -> None:
    model = build(name)
    assert model.size_multiple == (32, 32)
    for size in ((65, 64), (64, 48), (16, 16)):
        with pytest.raises(ConfigError, match=r"multiples of 32 .* dynamic_img_pad"):
            model(images(1, *size))
    with pytest.raises(ConfigError, match="multiples of 32"):
        model.set_input_size((60, 64))
    with pytest.raises(ConfigError, match="multiples of 32"):
        model.forward_intermediates(images(1, 60, 64))


def test_litv2_pads_on_request() -> None:
    model = build("litv2_s", dynamic_img_pad=True)
    plain = build("litv2_s")
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))
        found = model.forward_intermediates(images(1, 71, 90), intermediates_only=True)
        # 18 x 23 tokens, halved and rounded down.
        assert [tuple(f.shape[2:]) for f in found] == [(18, 23), (9, 11), (4, 5), (2, 2)]
        # The image padded by hand to a multiple of the patch is the same image.
        by_hand = torch.nn.functional.pad(images(1, 71, 90), (0, 2, 0, 1))
        torch.testing.assert_close(model(by_hand), model(images(1, 71, 90)))
    with pytest.raises(ConfigError, match="at least that large"):
        model(images(1, 31, 64))


def test_litv2_in_parts_is_litv2_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from visprune.backbones.vit import litv2

    model, x = build("litv2_s"), images(5)
    want = model(x).detach()  # with gradients nothing is split or overwritten
    monkeypatch.setattr(litv2, "SPLIT_ABOVE", 0)
    monkeypatch.setattr(litv2, "SPLIT_TO", 2 * 16 * 16 * 64 * 4)  # two images of the first stage
    mlp = model.layers[0].blocks[0].mlp
    hidden = torch.randn(5, 16, 16, 16)
    assert mlp._images_at_once(hidden) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    model(x).sum().backward()


def test_litv2_changes_its_patch_size() -> None:
    model = build("litv2_s")
    model.set_input_size(128, patch_size=8)
    assert model.size_multiple == (64, 64)
    assert [i["reduction"] for i in model.feature_info] == [8, 16, 32, 64]
    with torch.no_grad():
        assert model.forward_features(images(1, 128, 128)).shape == (1, 2, 2, 128)


@pytest.mark.parametrize("name", ["litv2_s", "nat_mini"])
def test_wrong_images(name: str) -> None:
    model = build(name)
    with pytest.raises(ConfigError, match=r"takes images \[B, 3, H, W\]"):
        model(torch.randn(1, 4, 64, 64))
    with pytest.raises(ConfigError, match=r"takes images \[B, 3, H, W\]"):
        model(torch.randn(3, 64, 64))
    grey = build(name, in_chans=1)
    assert grey(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="one entry per stage"):
        build("litv2_s", depths=(1, 1))
    with pytest.raises(ConfigError, match="one entry per stage"):
        build("nat_mini", dilations=((1,), (1,)))
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        build("nat_mini", num_heads=(3, 3, 3, 3))
    with pytest.raises(ConfigError, match="output_fmt"):
        build("nat_mini").forward_intermediates(images(), output_fmt="NLC")
