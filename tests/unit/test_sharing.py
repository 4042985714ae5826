# SPDX-License-Identifier: Apache-2.0
"""Pictures encoded once: what each carries, and how prompts choose among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests import tiny
from visprune.core.signals import ClsAttention, EncoderKeys, Fingerprint
from visprune.machine.encoder.tap import pictures_of

fingerprint = Fingerprint().read


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build("llava")


@pytest.fixture(scope="module")
def pixels() -> Any:
    return tiny.inputs("llava", [[1, "a", 1, "b", 1]])["pixel_values"]


@torch.no_grad()
def test_every_picture_carries_its_signals(model: Any, pixels: Any) -> None:
    images = visprune.encode_images(model, pixel_values=pixels)
    assert len(images) == 2
    want = model.model.get_image_features(pixel_values=pixels).pooler_output
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    found = pictures_of(images.select()["image"], "image")
    for number, picture in enumerate(found):
        assert torch.equal(images.features[number], want[number])
        assert picture.signals[Fingerprint()] == fingerprint(pixels[number])
        assert picture.pixels is None  # pictures hold no copy of what they were made from
        assert picture.signals[EncoderKeys("feature")].shape == (36, 12)
        # The last layer, and the last but one, whose output LLaVA reads.
        for which, layer in (("last", -1), ("feature", -2)):
            row = maps[layer][number][:, 0, 1:]
            got = picture.signals[ClsAttention(which)]  # [N, H]
            torch.testing.assert_close(got.T, row, rtol=1e-4, atol=1e-6)
    assert found[0].signals[Fingerprint()] != found[1].signals[Fingerprint()]


def test_prompts_choose_and_repeat(model: Any, pixels: Any) -> None:
    images = visprune.encode_images(model, pixel_values=pixels)
    chosen = images.select([1, 0, 1])["image"].pooler_output
    assert [f is images.features[n] for f, n in zip(chosen, [1, 0, 1], strict=True)] == [True] * 3
    assert len(images.select()["image"].pooler_output) == 2
    assert images.select([])["image"].pooler_output == []
    with pytest.raises(IndexError):
        images.select([2])


def test_encoding_leaves_nothing_on_the_model(model: Any, pixels: Any) -> None:
    model.model.get_image_features(pixel_values=pixels)  # transformers marks its hooks once
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    visprune.encode_images(model, pixel_values=pixels)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert [k for k in after if after[k].keys() != before[k].keys()] == []
    with pytest.raises(RuntimeError):
        visprune.encode_images(model, pixel_values=torch.zeros(1, 5, 24, 24))
    assert not [key for key in vars(model.model) if key.startswith("get_")]
    assert not model.model.vision_tower.encoder.layers[-1].self_attn._forward_pre_hooks


def test_a_fingerprint_depends_on_the_values_alone() -> None:
    x = torch.randn(3, 4, 5)
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(x) == fingerprint(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert fingerprint(x) != fingerprint(x + 1e-3)
    assert fingerprint(x.bfloat16()) == fingerprint(x.bfloat16().float())
