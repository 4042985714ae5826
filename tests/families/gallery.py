# SPDX-License-Identifier: Apache-2.0
"""Draws README's gallery: what a method keeps of one picture on three families.

``python -m tests.families.gallery``: models of random weights behind the processors of their
families at their defaults; it shows where patches lie, not what a trained model looks at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import visprune
from tests.families.test_processors import FAMILIES
from visprune.eval.show.figures import Panel, shown_picture
from visprune.eval.show.kept import kept_of, mosaic, paint
from visprune.machine.find import find_adapter

NAMES = {"qwen3_vl": "Qwen3-VL", "internvl": "InternVL", "smolvlm": "SmolVLM"}
KEEP = 0.15


def desk(width: int = 1024, height: int = 640) -> Image.Image:
    """A drawn picture, wider than high: sheets with lines, a cup, a plant, much empty table."""
    image = Image.new("RGB", (width, height), (196, 164, 128))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width, 210), fill=(214, 224, 232))
    for left, top, lines in ((90, 260, 9), (430, 320, 8)):
        draw.rectangle((left, top, left + 250, top + 280), fill=(250, 248, 240))
        for line in range(lines):
            y = top + 28 + 27 * line
            draw.line((left + 24, y, left + 226 - 37 * (line % 3), y), fill=(60, 60, 70), width=4)
    draw.ellipse((760, 360, 900, 500), fill=(160, 40, 40))
    draw.ellipse((785, 385, 875, 475), fill=(60, 30, 20))
    draw.rectangle((880, 120, 960, 220), fill=(120, 80, 60))
    for angle in np.linspace(0.15, np.pi - 0.15, 9):
        tip = (920 + 110 * np.cos(angle), 120 - 100 * np.sin(angle))
        draw.line((920, 120, *tip), fill=(40, 120, 60), width=9)
    return image


@torch.no_grad()
def panel(family: str, image: Image.Image) -> Panel:
    """The picture as one family sees it, with what is kept."""
    torch.manual_seed(0)
    model, processor, mark = FAMILIES[family][0]()
    model.eval()
    text = f"{mark} what is in this picture ?"
    inputs = processor(images=[[image]], text=[text], return_tensors="pt")
    with visprune.prune(model, "divprune", keep_ratio=KEEP) as run:
        model(**inputs, logits_to_keep=1)
    kept = kept_of(run.trace)
    regions = find_adapter(model).regions(len(kept.regions), image.size)
    boxes = {t: r.box for t, r in zip(kept.regions, regions, strict=True) if len(regions) > 1}
    tiles = {t: box for t, box in boxes.items() if box is not None and box != (0, 0, 1, 1)}
    painted = mosaic(image, kept, tiles) if tiles else paint(image, kept, kept.regions[0], cell=28)
    parts = f", {len(tiles)} tiles and the whole" if tiles else ""
    return Panel(painted, f"{NAMES[family]}: {len(kept.index)} of {len(kept.dest)}{parts}")


def main(out: str = ".github/assets/families.png") -> None:
    """Draw."""
    image = desk()
    panels = [panel(family, image) for family in NAMES]
    shown_picture(
        Panel(np.asarray(image), f"{image.width} x {image.height}"), panels, Path(out),
        title="divprune, 15 % of the tokens of one picture", note="Models of random weights.",
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
