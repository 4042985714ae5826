# SPDX-License-Identifier: Apache-2.0
"""Families whose decoder puts pictures into the text itself: Chameleon, Phi-4 multimodal.

There is no place between merging and the layers where a hook could stand. Their decoder takes a
merged sequence just as well (``inputs_embeds``), so it is given one: merged here, by the model's
own parts and to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.hf.cache import cache_of
from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.backbones.vlm.marked import CodesAdapter
from visprune.backbones.vlm.picture import Picture, grid
from visprune.backbones.vlm.placeholders import mismatch
from visprune.backbones.vlm.regions import Region

Note = Callable[[Kind, list[Picture]], None]


class ChameleonAdapter(CodesAdapter):
    """Chameleon: codes of a picture's cells, embedded as words are; no newlines among them."""

    merges_inside = True

    def find_decoder(self) -> Any:
        """The core itself."""
        return self.core

    def grids_of(self, call: dict[str, Any], kind: Kind) -> list[Any] | None:
        """(t, h, w) in cells of each picture."""
        side = 2 ** (len(self.config.vq_config.channel_multiplier) - 1)  # halved between levels
        height, width = call["pixel_values"].shape[-2:]
        return [(1, height // side, width // side)] * len(call["pixel_values"])

    def free(self, count: int, cells: tuple[int, int, int] | None) -> Tensor:
        """All of them."""
        return torch.ones(count, dtype=torch.bool)

    def layer_input(self, layer: Any, hidden: Tensor) -> Tensor:
        """What the attention of a layer is given: with ``swin_norm``, what leaves it is normed."""
        return hidden if self.config.swin_norm else super().layer_input(layer, hidden)

    def embedded(self, args: tuple[Any, ...], kwargs: dict[str, Any], note: Note) -> dict[str, Any]:
        """The arguments of the decoder with pictures in place of their placeholders."""
        call = self.bind(args, kwargs)
        pixels, encoded = call.pop("pixel_values", None), call.get("mm_encoder_outputs") or {}
        output = encoded.get("image")
        if output is None and pixels is not None:
            output = self.core.get_image_features(pixels, return_dict=True)
        elif output is not None and call.get("input_ids") is not None:
            self.check_placeholders(call)
        call.pop("mm_encoder_outputs", None)
        if output is not None:
            places = self._placeholders(call, "image")[..., None]
        if call.get("inputs_embeds") is None:
            call = super().embedded((), call, note)
        if output is not None:
            embeds = call["inputs_embeds"]
            features = output.pooler_output.to(embeds.device, embeds.dtype)
            call["inputs_embeds"] = embeds.masked_scatter(places.to(embeds.device), features)
        return {**call, "input_ids": None}


_EMBEDDED = (
    *("image_pixel_values", "image_sizes", "image_attention_mask"),
    *("audio_input_features", "audio_embed_sizes", "audio_attention_mask"),
)


class Phi4Adapter(GenericAdapter):
    """Phi-4 multimodal: crops packed into one grid, a separator, and the whole picture.

    A newline stands behind every row of both. Newlines and the separator are protected.
    """

    merges_inside = True

    def find_decoder(self) -> Any:
        """The core itself."""
        return self.core

    def regions(self, count: int, size: tuple[int, int]) -> list[Region]:
        """The grid, then the whole."""
        return [Region("full picture"), Region("thumbnail")]

    def token_id(self, kind: Kind) -> int | None:
        """The placeholder of pictures; clips have none."""
        return int(self.config.vision_config.image_token_id) if kind == "image" else None

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        return self.core.embed_tokens_extend.image_embed.img_processor

    @property
    def _unread(self) -> str:
        """Why the encoder cannot be read."""
        return "its encoder's patches are padded, pooled and cut to the picture behind its layers"

    def embedded(self, args: tuple[Any, ...], kwargs: dict[str, Any], note: Note) -> dict[str, Any]:
        """The arguments of the decoder with pictures and sounds in place of their placeholders.

        Raises:
            ConfigError: placeholders and pictures do not match.
        """
        call = self.bind(args, kwargs)
        given = {name: call.pop(name, None) for name in _EMBEDDED}
        if call.get("inputs_embeds") is not None:
            return call
        ids = call.pop("input_ids")
        if given["image_pixel_values"] is not None:
            self._encode(ids, given, note, first=not _seen(call))
        embeds = self.core.embed_tokens(ids)
        return {**call, "inputs_embeds": self.core.embed_tokens_extend(ids, embeds, **given)}

    def _encode(self, ids: Tensor, given: dict[str, Any], note: Note, *, first: bool) -> None:
        """Tell of the pictures that are encoded for a call; later calls are given them for nothing.

        Args:
            ids: of the call, ``[B, S]``.
            given: what its pictures are made of.
            note: whom to tell.
            first: whether nothing was cached before.
        """
        found = int(self._placeholders({"input_ids": ids}, "image").sum())
        if not found and not first:
            return
        pictures = self.pictures(given, "image")
        counts = [len(picture.free) for picture in pictures]
        if sum(counts) != found:
            raise mismatch("image", found, counts, self.token_id("image"))
        note("image", pictures)

    def pictures(self, call: dict[str, Any], kind: Kind) -> list[Picture]:
        """One picture for each row of pixels: crops, and the whole before them."""
        side = math.isqrt(self.core.embed_tokens_extend.image_embed.num_img_tokens)
        crops = call["image_pixel_values"]
        sizes = torch.as_tensor(call["image_sizes"]).view(-1, 2).tolist()
        masks = call["image_attention_mask"]
        found = []
        for pixels, mask, size in zip(crops, masks, sizes, strict=True):
            down, across = (int(edge) // int(self.config.vision_config.crop_size) for edge in size)
            there = mask[1 : down * across + 1, 0::2, 0::2].view(down, across, side, side)
            there = there.transpose(1, 2).reshape(down * side, across * side)
            rows, columns = int(there[:, 0].sum()), int(there[0].sum())
            free = torch.cat([_lined(rows, columns), _NONE, _lined(side, side)])
            cells = (1, mask.shape[-2], mask.shape[-1])
            found.append(
                Picture(
                    free=free,
                    pos=_places(rows, columns, side),
                    source=None,
                    pixels=pixels[: down * across + 1],
                    grids=(cells,) * (down * across + 1),
                )
            )
        return found


_NONE = torch.zeros(1, dtype=torch.bool)


def _lined(rows: int, columns: int) -> Tensor:
    """Which tokens are no newlines, of rows that end with one."""
    found = torch.ones(rows, columns + 1, dtype=torch.bool)
    found[:, -1] = False
    return found.flatten()


def _places(rows: int, columns: int, side: int) -> Tensor:
    """(t, h, w) of a grid (t 0) and of the whole picture behind it (t 1)."""
    return torch.cat([grid(1, rows, columns), grid(1, side, side) + torch.tensor([1, 0, 0])])


def _seen(call: dict[str, Any]) -> int:
    """Tokens that are cached before a call."""
    cache = cache_of(call)
    return 0 if cache is None else int(cache.get_seq_length())
