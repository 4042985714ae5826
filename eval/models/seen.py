# SPDX-License-Identifier: Apache-2.0
"""What of a picture a model does not see: of classifiers' transforms, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from visprune.backbones.vlm.seen import Canvas, Seen

__all__ = ["describe_seen", "pad_to_square", "seen_by_transform", "seen_of_record"]

_TOLD = 1.05  # of squeezing: encoders round a picture to whole patches


def seen_by_transform(transform: Any, size: tuple[int, int]) -> Seen:
    """Return what the torchvision transform of a timm or open_clip model leaves of a picture.

    Args:
        transform: a ``Compose`` of ``Resize`` and ``CenterCrop`` and what moves no pixel.
        size: width and height of the picture.

    Returns:
        Where the grid lies; all of the picture also for steps that it does not know.
    """
    from torchvision import transforms

    canvas = Canvas.of(size)
    for step in getattr(transform, "transforms", ()):
        if isinstance(step, transforms.Resize):
            sides = step.size
            if isinstance(sides, Sequence) and len(sides) == 2:
                canvas.resize(*sides)
            else:
                canvas.resize_shortest(sides[0] if isinstance(sides, Sequence) else sides)
        elif isinstance(step, transforms.CenterCrop):
            canvas.center_crop(*step.size)
        elif "crop" in type(step).__name__.lower() or "resize" in type(step).__name__.lower():
            return Seen()
    return canvas.seen()


def seen_of_record(seen: Seen) -> dict[str, Any]:
    """What a record keeps of it beside the kept patches; nothing where all is seen as it is."""
    found: dict[str, Any] = {} if seen.box is None else {"box": list(seen.box)}
    if seen.squeezed > _TOLD:
        found["stretch"] = round(seen.stretch, 4)
    return found


def describe_seen(seen: Seen, size: tuple[int, int]) -> str | None:
    """Say what a model does not see of a picture, or sees out of shape; ``None``: nothing.

    Args:
        seen: what it sees.
        size: width and height of the picture.
    """
    said = []
    if seen.share < 0.995:
        said.append(f"cut to the middle ({1 - seen.share:.0%} of it is not seen)")
    if seen.squeezed > _TOLD:
        said.append(f"squeezed by {seen.squeezed:.2g}")
    return f"{size[0]} x {size[1]}, {' and '.join(said)}" if said else None


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Put a picture into the middle of a square of the mean colour, as LLaVA's evaluation does.

    Args:
        image: RGB.
        mean: of the processor, by channel, in [0, 1].
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    red, green, blue = (int(255 * share) for share in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
