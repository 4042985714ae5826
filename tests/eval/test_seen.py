# SPDX-License-Identifier: Apache-2.0
"""Where the grid of kept patches lies on a picture, found again in the pixels that models get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_transform
from transformers import (
    CLIPImageProcessor,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    PixtralImageProcessor,
)

import visprune
from tests import tiny
from visprune.eval.models.base import Request
from visprune.eval.models.seen import seen_by_processor, seen_by_transform
from visprune.eval.models.vit import TimmClassifier
from visprune.eval.models.vlm import VLM
from visprune.eval.tasks.base import Sample, get_task
from visprune.eval.tasks.imagenet import ImageNet

SIZES = [(400, 100), (100, 400), (301, 200), (224, 224), (97, 333)]
SMALL: dict[str, Any] = {"do_normalize": False, "do_rescale": False}


def ramp(size: tuple[int, int]) -> Image.Image:
    """Red grows from left to right, green from top to bottom, blue says: this is picture."""
    across, down = np.meshgrid(*(np.linspace(0, 255, side) for side in size))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 255)], -1).astype(np.uint8))


def ends(pixels: Any) -> list[float]:
    """Left, top, right, bottom of the pixels ``[3, H, W]``, in fractions of the ramp.

    Lines are laid through what is picture, so that padding is found by going on beyond it.
    """
    red, green, blue = np.asarray(pixels, np.float64)
    inside = blue > 250
    found = []
    for values, axis in ((red, 1), (green, 0)):
        line = np.where(inside, values, np.nan)
        line = np.nanmean(line[:, inside.any(0)] if axis else line[inside.any(1)], axis=1 - axis)
        place = np.flatnonzero(inside.any(1 - axis))
        keep = slice(len(place) // 4, max(len(place) // 4 + 2, 3 * len(place) // 4))
        slope, start = np.polyfit(place[keep], line[keep] / 255, 1)
        count = inside.shape[axis]
        found.append((start - slope / 2, start + slope * (count - 0.5)))
    return [found[0][0], found[1][0], found[0][1], found[1][1]]


def close(box: list[float] | None, pixels: Any) -> None:
    assert (box or [0, 0, 1, 1]) == pytest.approx(ends(pixels), abs=0.025)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 84}, crop_size=84, **SMALL),
        CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=84, **SMALL),
        CLIPImageProcessor(size={"height": 84, "width": 84}, crop_size=84, **SMALL),
        CLIPImageProcessor(size={"height": 84, "width": 84}, do_center_crop=False, **SMALL),
        LlavaImageProcessor(do_pad=True, size={"shortest_edge": 84}, crop_size=84,
                            image_mean=[0, 0, 0], image_std=[1, 1, 1], **SMALL),
    ],
    ids=["crop", "crop within", "squeeze", "squeeze alone", "pad"],
)  # fmt: skip
def test_the_grid_of_llava_lies_where_its_pixels_come_from(
    processor: Any, size: tuple[int, int]
) -> None:
    pixels = processor(ramp(size), return_tensors="pt")["pixel_values"][0]
    close(seen_by_processor(processor, "llava", size), pixels)


@pytest.mark.parametrize("size", SIZES)
def test_a_thumbnail_of_llava_next_is_the_whole_picture(size: tuple[int, int]) -> None:
    """Its processor speaks of a crop, of tiles that have that size already."""
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 84}, crop_size=84, image_grid_pinpoints=[[84, 168], [168, 84]],
        **SMALL,
    )  # fmt: skip
    assert processor.do_center_crop
    pixels = processor(ramp(size), return_tensors="pt")["pixel_values"][0, 0]
    close(seen_by_processor(processor, "llava_next", size), pixels)
    assert seen_by_processor(processor, "llava_next", size) is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{"crop_pct": 0.9}, {"crop_pct": 1.0, "crop_mode": "squash"}])
def test_the_grid_of_a_classifier_lies_where_its_pixels_come_from(
    options: dict[str, Any], size: tuple[int, int]
) -> None:
    transform = create_transform(
        (3, 96, 96), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", **options
    )
    close(seen_by_transform(transform, size), 255 * transform(ramp(size)).numpy())


def test_steps_that_are_not_known_claim_nothing() -> None:
    transform = create_transform((3, 96, 96), crop_pct=0.9, crop_mode="border")
    assert seen_by_transform(transform, (400, 100)) is None


def test_a_classifier_s_record_says_where_its_grid_lies() -> None:
    model = TimmClassifier(timm.create_model("vit_tiny_patch16_224", depth=2))
    sample = Sample(id="0", question="", image=lambda: ramp((200, 100)))
    request = Request(sample, "", sample.image())
    method = visprune.get_method("evit", keep_ratio=0.5)
    with model.answering(method, ImageNet(), "plain", {}) as answerer:
        (output,) = answerer([request])
    assert output.kept is not None
    left, top, right, bottom = output.kept["box"]
    assert (1 - right, 1 - bottom) == pytest.approx((left, top))
    assert 0.25 < left < 0.3  # a square of nine tenths of the height
    assert 0.04 < top < 0.06


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_s_grid_covers_the_picture(family: str) -> None:
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=336 * 336, patch_size=14,
                                      merge_size=2, temporal_patch_size=1, **SMALL)  # fmt: skip
    made = processor(ramp((301, 200)), return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    # Patches of one merged token lie together: [rows/2, columns/2, 2, 2, channel, y, x].
    tiles = made["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 14, 14)
    whole = tiles.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)
    close(seen_by_processor(processor, family, (301, 200)), whole)


def test_boxes_in_pixels_are_read_only_of_the_size_that_the_model_sees() -> None:
    from transformers import Qwen2VLImageProcessor

    seen = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=50176, **SMALL)
    processor = SimpleNamespace(image_processor=seen)
    model = VLM(tiny.build("qwen2_5_vl"), processor, name="q")
    fitting = get_task("refcoco_rec", scale="pixels", min_pixels=3136, max_pixels=50176)
    assert model.refusal("none", fitting) is None
    assert model.refusal("none", get_task("refcoco_rec")) is None
    other = get_task("refcoco_rec", scale="pixels", min_pixels=3136, max_pixels=1003520)
    assert "processor of q has 3136 to 50176" in (model.refusal("none", other) or "")


@pytest.mark.parametrize("size", SIZES)
def test_pixtral_sees_all_of_a_picture(size: tuple[int, int]) -> None:
    processor = PixtralImageProcessor(size={"longest_edge": 128}, patch_size=16)
    made = processor(images=ramp(size), **SMALL, return_tensors="np")
    height, width = made["image_sizes"][0]
    box = seen_by_processor(processor, "llava", size)
    assert box is None
    close(box, made["pixel_values"][0][:, :height, :width])
