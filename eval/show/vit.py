# SPDX-License-Identifier: Apache-2.0
"""Draw which patches of a picture a vision transformer keeps, and which it merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.show.figures import Panel, shown_picture
from visprune.eval.show.vlm import open_picture
from visprune.machine.run import prune

__all__ = ["paint_slots", "show_vit"]


def show_vit(
    picture: str | Path,
    *,
    model: str | Any = "deit_small_patch16_224",
    method: str = "tome",
    out: str | Path = "kept-vit.png",
    pretrained: bool = False,
    cell: int = 48,
    **params: Any,
) -> dict[str, Any]:
    """Run a vision transformer on a picture under a method, and draw what became of its patches.

    Args:
        picture: any image file that Pillow reads.
        model: a name of timm, or a loaded model of timm.
        method: a method for vision transformers.
        out: drawing to write; its ending gives the format.
        pretrained: whether timm is asked for weights (from its cache or the Hub).
        cell: pixels per patch in the drawing.
        **params: of the method.

    Returns:
        ``kept``, ``num_tokens``, ``trace`` and ``out``.

    Raises:
        ConfigError: no such file, model or method.
        UnsupportedModel: the model cannot run the method.
    """
    image = open_picture(picture)
    if isinstance(model, str):
        if not timm.is_model(model.partition(".")[0]):
            raise ConfigError(f"timm has no {model!r}.{did_you_mean(model, timm.list_models())}")
        torch.manual_seed(0)
        model = timm.create_model(model, pretrained=pretrained)
    model = model.eval()
    own = getattr(model.patch_embed, "img_size", None)  # may differ from the registered one
    given = {} if own is None else {"input_size": (3, *own)}
    config = timm.data.resolve_data_config(given, model=model)
    pixels = timm.data.create_transform(**config)(image)[None]
    with torch.no_grad(), prune(model, method, **params) as run:
        model(pixels)
        trace = run.trace
    seen = _seen(pixels[0], config)
    (_, rows, columns), slots = trace.grids[0][0], trace.slots[0]
    painted = paint_slots(seen, slots.view(rows, columns), cell)
    merged = int((trace.sizes[0] > 1).sum())
    note = (
        f"{run.method.name}: {len(trace.kept[0])} tokens left of {trace.num_tokens[0]} patches, "
        f"{merged} of them merged; {trace.mean_tokens[0]:.1f} in the mean over layers. Patches "
        f"that share a token share its mean colour; what was dropped lies under a veil."
    )
    original = Panel(np.asarray(seen), f"{trace.num_tokens[0]} patches")
    panel = Panel(painted, f"{len(trace.kept[0])} tokens after the last layer")
    shown_picture(original, [panel], Path(out), title=f"{Path(picture).name} under {method}",
                  note=note)  # fmt: skip
    return {"kept": len(trace.kept[0]), "num_tokens": trace.num_tokens[0], "trace": trace,
            "out": Path(out)}  # fmt: skip


def _seen(pixels: Tensor, config: dict[str, Any]) -> Image.Image:
    """The part of the picture that the model was given."""
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    array = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def paint_slots(picture: Image.Image, slots: Tensor, cell: int) -> np.ndarray:
    """Paint every token in the mean colour of its patches, with a line where tokens meet.

    Args:
        picture: what the grid covers.
        slots: the token of every patch, -1 where it was dropped, ``[rows, columns]``.
        cell: side of a patch, pixels.

    Returns:
        uint8 ``[rows * cell, columns * cell, 3]``. A token of one patch shows the patch itself.
    """
    rows, columns = slots.shape
    size = (columns * cell, rows * cell)
    canvas = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float32)
    owner = np.kron(slots.numpy(), np.ones((cell, cell), np.int64))
    out = canvas.copy()
    for slot in np.unique(owner):
        inside = owner == slot
        if slot < 0:
            gray = canvas[inside] @ np.array([0.299, 0.587, 0.114], np.float32)
            out[inside] = 0.84 * 236.0 + 0.16 * gray[:, None]
        elif inside.sum() > cell * cell:
            out[inside] = canvas[inside].mean(0)
    edge = np.zeros(owner.shape, bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    out[edge] = 255.0
    return np.clip(out, 0, 255).astype(np.uint8)
