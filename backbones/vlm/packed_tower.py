# SPDX-License-Identifier: Apache-2.0
"""Encoders that take patches with their places, in one sequence: Qwen-VL's. Some may be left out.

Every patch comes with what says where it lies (rotary ids, rows of a position table, its frame, its
window), so what is left of a picture is encoded as if the rest had never been there. transformers
lets these tensors be given; where they are not, it makes those of whole pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import vision_utils
except ImportError:  # pragma: no cover - transformers before 5.7
    vision_utils = None

_MAKERS = ("get_vision_position_ids", "get_vision_cu_seqlens")


def why_not_packed() -> str | None:
    """Why this transformers' encoders cannot be told the places of their patches; ``None``: can."""
    for name in _MAKERS:
        made = getattr(vision_utils, name, None)
        if made is None or "kwargs" not in inspect.signature(made).parameters:
            return (
                "its encoder takes places of patches from transformers 5.9 on: pip install -U "
                "'transformers>=5.9'"
            )
    return None


@dataclass(frozen=True)
class Cut:
    """What an encoder is given of pictures of which blocks of patches were left out.

    Attributes:
        pixels: the patches that are left, ``[P, C]``.
        arguments: what the encoder would make of whole pictures, by name.
        frames: of every picture, the patches of each frame.
        windows: the same of each window, where layers attend within windows; else empty.
    """

    pixels: Tensor
    arguments: dict[str, Any]
    frames: list[tuple[int, ...]]
    windows: list[tuple[int, ...]]


class PackedTower:
    """Such an encoder.

    Args:
        tower: the encoder, called with ``[P, C]`` patches, block after block, and ``grid_thw``.
        merge: side of the block of patches that becomes one token.
    """

    def __init__(self, tower: nn.Module, merge: int) -> None:
        self.tower: Any = tower
        self.unit = merge * merge
        self.merge = merge
        self._signature = inspect.signature(type(tower).forward)

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Pixels, grids and the other arguments of a call."""
        names = [*self._signature.parameters][1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return given.pop("hidden_states"), given.pop("grid_thw"), given

    def blocks(self, pixels: Tensor, grids: Tensor) -> list[Tensor]:
        """The pixels of every picture, one row a block, in raster order, ``[N, unit * C]``."""
        counts = (grids.prod(-1) // self.unit).tolist()
        return list(pixels.reshape(len(pixels) // self.unit, -1).split(counts))

    def cut(
        self, pixels: Tensor, grids: Tensor, given: Mapping[str, Any], keep: Sequence[Tensor]
    ) -> Cut:
        """Leave blocks of patches out.

        Args:
            pixels: ``[P, C]``.
            grids: (t, h, w) in patches of every picture.
            given: what else the encoder was given.
            keep: which blocks of each picture stay, ``[N]`` bool; at least one of all.
        """
        device = grids.device
        blocks = torch.cat([one.to(device) for one in keep])
        patches = blocks.repeat_interleave(self.unit)
        arguments = dict(given)
        made = {"position_ids": self._positions(grids, arguments)[patches]}
        segments = vision_utils.get_vision_cu_seqlens(grids, kwargs=arguments)
        arguments.pop("max_seqlen", None)
        frame = _segment_of(segments)[patches]
        sizes = torch.bincount(frame, minlength=len(segments) - 1)
        made["cu_seqlens"] = _ends(sizes)
        frames = _split(sizes, grids[:, 0].tolist())
        windows: list[tuple[int, ...]] = [()] * len(grids)
        if hasattr(self.tower, "fullatt_block_indexes"):
            more, windows = self._windows(grids, arguments, blocks)
            made |= more
        if hasattr(self.tower, "pos_embed"):
            index, weights = self._table(grids, arguments)
            made |= {"interp_indices": index[patches], "interp_weights": weights[patches]}
        return Cut(pixels[patches.to(pixels.device)], {**arguments, **made}, frames, windows)

    def whole(self, output: Any, keep: Sequence[Tensor]) -> Any:
        """The output with a row for every block again, zero where it was left out."""
        found = output.pooler_output
        blocks = torch.cat([one.to(found.device) for one in keep])
        output.pooler_output = _spread(found, blocks)
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            output.deepstack_features = [_spread(one, blocks) for one in deep]
        return output

    def _positions(self, grids: Tensor, given: dict[str, Any]) -> Tensor:
        return vision_utils.get_vision_position_ids(grids, self.merge, kwargs=given)

    def _table(self, grids: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rows of the position table that each patch takes, and their weights."""
        tower = self.tower
        return vision_utils.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=tower.num_grid_per_side, mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners, spatial_merge_size=self.merge,
            kwargs=given,
        )  # fmt: skip

    def _windows(
        self, grids: Tensor, given: dict[str, Any], blocks: Tensor
    ) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
        """Order of the blocks by window and its bounds, and what is left in each window."""
        tower = self.tower
        order, ends = vision_utils.get_vision_window_index(
            grids, spatial_merge_size=self.merge, window_size=tower.window_size,
            patch_size=tower.patch_size, kwargs=given,
        )  # fmt: skip
        given.pop("max_window_seqlen", None)
        order = order.to(blocks.device)
        window = _segment_of(ends.to(blocks.device) // self.unit)
        left = blocks[order]
        sizes = torch.bincount(window[left], minlength=len(ends) - 1) * self.unit
        renumbered = blocks.cumsum(0) - 1
        made = {"window_index": renumbered[order[left]], "cu_window_seqlens": _ends(sizes)}
        counts = grids.prod(-1) // self.unit
        picture = torch.arange(len(grids), device=blocks.device).repeat_interleave(counts)
        first = torch.ones_like(window, dtype=torch.bool)
        first[1:] = window[1:] != window[:-1]
        each = torch.bincount(picture[order[first]], minlength=len(grids))
        return made, _split(sizes, each.tolist())


def _segment_of(ends: Tensor) -> Tensor:
    """The segment of each place, from cumulative lengths."""
    lengths = ends.diff()
    return torch.arange(len(lengths), device=ends.device).repeat_interleave(lengths)


def _ends(sizes: Tensor) -> Tensor:
    """Cumulative lengths of the segments that are not empty, from 0."""
    ends = torch.nn.functional.pad(sizes[sizes > 0].cumsum(0), (1, 0))
    return ends.to(torch.int32)


def _split(sizes: Tensor, counts: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(part.tolist()) for part in sizes.split(list(counts))]


def _spread(rows: Tensor, there: Tensor) -> Tensor:
    """Rows in the places where ``there`` is true, zeros elsewhere."""
    out = rows.new_zeros(len(there), *rows.shape[1:])
    return out.index_put((there.nonzero()[:, 0],), rows)
