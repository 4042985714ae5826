# SPDX-License-Identifier: Apache-2.0
"""Find the parts of a vision-language model by what they are, whatever they are called."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn

from visprune.errors import UnsupportedModel


def find_decoder(core: nn.Module) -> Any:
    """The module inside ``core`` that has layers and takes the embedded sequence.

    It is told from an encoder of the same make by the embedding table, which is the model's.

    Raises:
        UnsupportedModel: there is none.
    """
    table = core.get_input_embeddings()  # type: ignore[operator]
    for module in core.modules():
        if module is core or not isinstance(getattr(module, "layers", None), nn.ModuleList):
            continue
        takes = inspect.signature(module.forward).parameters
        if "inputs_embeds" in takes and _table_of(module) is table:
            return module
    raise UnsupportedModel(
        f"{type(core).__name__} has no decoder of its own that is given the merged sequence "
        f"(inputs_embeds): where its visual tokens enter is not known."
    )


def _table_of(module: nn.Module) -> Any:
    """The embedding table of a module, ``None`` if it has none."""
    embeddings = getattr(module, "get_input_embeddings", None)
    try:
        return None if embeddings is None else embeddings()
    except NotImplementedError:  # of an encoder that says so
        return None


def merged_grid(grid: tuple[int, int, int], tokens: int) -> tuple[int, int, int] | None:
    """The grid of tokens that a grid of patches (t, h, w) became, ``None`` if it is none.

    An encoder joins blocks of m x m patches, some also frames.
    """
    t, h, w = grid
    patches = t * h * w
    for frames in range(1, t + 1):
        if t % frames or not tokens or patches % (tokens * frames):
            continue
        side = math.isqrt(patches // (tokens * frames))
        fits = side > 0 and h % side == 0 and w % side == 0
        if fits and side * side * frames * tokens == patches:
            return t // frames, h // side, w // side
    return None


def likely_grid(tokens: int, pixels: Tensor | None) -> tuple[int, int, bool]:
    """Rows and columns of a picture of which only the number of tokens is known.

    Args:
        tokens: its tokens, in raster order.
        pixels: the picture, ``[..., 3, H, W]``, if that is known.

    Returns:
        The two, and whether they are sure: all cells are squares of pixels.
    """
    height, width = (1, 1) if pixels is None else pixels.shape[-2:]
    best = min(
        (n for n in range(1, tokens + 1) if tokens % n == 0),
        key=lambda n: (abs(math.log((tokens / n / n) / (width / height))), n),
    )
    columns = tokens // best
    sure = pixels is not None and height * columns == width * best
    return best, columns, sure
