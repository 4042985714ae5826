# SPDX-License-Identifier: Apache-2.0
"""Drawings of tiled pictures, against the tiles that each family's own processor cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image, ImageDraw
from torch import Tensor

from tests.eval.family_processor import FamilyProcessor
from tests.families import tiny
from visprune.backbones.vlm.generic import NamedTilesAdapter, OvisAdapter, TilesAdapter
from visprune.backbones.vlm.perception import PerceptionAdapter
from visprune.backbones.vlm.regions import WHOLE, layout
from visprune.errors import ConfigError
from visprune.eval.show.kept import KeptMap, mosaic, seen_part
from visprune.eval.show.vlm import show

CROPS = {"crop_to_patches": True, "max_patches": 12}
PROCESSORS: dict[str, tuple[Any, Any]] = {
    "internvl": (lambda: tf.GotOcr2ImageProcessor(**CROPS), TilesAdapter),
    "cohere2_vision": (lambda: tf.Cohere2VisionImageProcessor(), TilesAdapter),
    "smolvlm": (lambda: tf.SmolVLMImageProcessor(), NamedTilesAdapter),
    "perception_lm": (lambda: tf.PerceptionLMImageProcessor(), PerceptionAdapter),
}
SIZES = [(900, 500), (500, 900), (640, 640), (1000, 700), (1200, 360)]
GRID = 8  # cells along one side of a tile, here


def scene(size: tuple[int, int]) -> Image.Image:
    """A dark picture with one bright spot off its middle."""
    image = Image.new("RGB", size, (40, 40, 40))
    across, down = size
    spot = (0.45 * across, 0.1 * down, 0.85 * across, 0.6 * down)
    ImageDraw.Draw(image).rectangle(spot, fill=(250, 250, 250))
    return image


def tiles_of(name: str, image: Image.Image) -> Tensor:
    """What the processor makes, from 0 to 1: ``[T, 3, H, W]``."""
    processor = PROCESSORS[name][0]()
    made = processor(images=[image], return_tensors="pt")
    pixels = made["pixel_values"].flatten(0, -4)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std)
    )
    return (pixels * std + mean).clamp(0, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_tile_is_the_part_of_the_picture_that_it_is_drawn_on(
    name: str, size: tuple[int, int]
) -> None:
    image = scene(size)
    tiles = tiles_of(name, image)
    kind = PROCESSORS[name][1]
    regions = kind.regions(kind.__new__(kind), len(tiles), size)
    assert len(regions) == len(tiles)
    for region, tile in zip(regions, tiles, strict=True):
        part = seen_part(image, region.box).resize((64, 64), Image.Resampling.BILINEAR)
        want = torch.from_numpy(np.asarray(part, np.float32) / 255).movedim(-1, 0)
        got = torch.nn.functional.interpolate(tile[None], (64, 64), mode="area")[0]
        assert float((got - want).abs().mean()) < 0.03, region


@pytest.mark.parametrize("name", PROCESSORS)
def test_kept_cells_lie_on_what_they_saw(name: str) -> None:
    size = (900, 500)
    image = scene(size)
    tiles = tiles_of(name, image)
    kind = PROCESSORS[name][1]
    regions = kind.regions(kind.__new__(kind), len(tiles), size)
    cells = torch.nn.functional.adaptive_avg_pool2d(tiles.mean(1), GRID)  # [T, 8, 8]
    bright = (cells > 0.9).flatten()
    t, h, w = torch.meshgrid(*map(torch.arange, cells.shape), indexing="ij")
    index = bright.nonzero()[:, 0]
    dest = torch.full((cells.numel(),), -1)
    dest[index] = torch.arange(len(index))
    kept = KeptMap(torch.stack([t, h, w], -1).reshape(-1, 3), dest, index)
    parts = {n: region.box for n, region in enumerate(regions) if region.box != WHOLE}
    painted = mosaic(image, kept, parts)
    shown = np.asarray(image.resize((painted.shape[1], painted.shape[0])), np.float32).mean(-1)
    # What is kept stands as it is, in frames; the rest lies under a veil of 236.
    as_it_is = np.abs(painted.astype(np.float32).mean(-1) - shown) < 8
    inside = shown > 245
    assert as_it_is[inside].mean() > 0.5  # cells at the border of the spot are not all bright
    assert as_it_is[shown < 50].mean() < 0.05


def test_tiles_whose_layout_is_not_told_are_left_out() -> None:
    regions = OvisAdapter.regions(OvisAdapter.__new__(OvisAdapter), 7, (900, 500))
    assert [region.box for region in regions] == [WHOLE, *[None] * 6]


def test_layouts_are_those_of_the_picture_s_shape() -> None:
    assert layout(12, (900, 500)) == (3, 4)
    assert layout(12, (500, 900)) == (4, 3)
    assert layout(2, (900, 500)) == (1, 2)
    assert layout(7, (3000, 300)) == (1, 7)


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "qwen3_vl", "mistral3", "gemma3"])
def test_families_are_drawn(family: str, tmp_path: Path, capsys: Any) -> None:
    model = tiny.build(family)
    model.generation_config.suppress_tokens = list(range(86, 100))
    processor = FamilyProcessor(family)
    picture = tmp_path / "in.png"
    scene((90, 60)).save(picture)
    made = show(picture, question="w9 w10", method="divprune", num_keep=3,
                out=tmp_path / "out.png", model=(model, processor), max_new_tokens=2)  # fmt: skip
    assert made["kept"] == 3
    assert made["num_tokens"] == tiny.parts._COUNTS[family, "a"]
    assert Image.open(made["out"]).width > 400


def test_learned_queries_are_not_drawn(tmp_path: Path) -> None:
    model = tiny.build("aria")
    model.generation_config.suppress_tokens = list(range(86, 100))
    picture = tmp_path / "in.png"
    scene((90, 60)).save(picture)
    with pytest.raises(ConfigError, match="learned queries, which are no patches"):
        show(picture, question="w9", method="divprune", num_keep=3, out=tmp_path / "out.png",
             model=(model, FamilyProcessor("aria")), max_new_tokens=2)  # fmt: skip
