# SPDX-License-Identifier: Apache-2.0
"""Listen to the vision encoder: which picture became which features, and how it attended."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from visprune import ops
from visprune.backbones.hf.probe import Record, watch
from visprune.backbones.vlm.base import Picture, VLMAdapter, fingerprint
from visprune.errors import ConfigError

_MARK = "_visprune_picture"
Layer = Literal["last", "feature"]


class EncoderTap:
    """Wraps ``get_image_features`` and ``get_video_features`` of one model instance.

    Each feature tensor of the output carries its :class:`Picture`. ``generate`` encodes pictures
    before the first forward, repeats their features for beams and passes on nothing else, so this
    is where their sizes, pixels and attention can still be had.

    Args:
        adapter: the model family.
        layers: encoder layers whose class-token attention is kept.
        keys: whether the feature layer's keys are kept.
        fingerprints: whether pixels are fingerprinted.
    """

    def __init__(
        self, adapter: VLMAdapter, layers: tuple[Layer, ...], *, keys: bool, fingerprints: bool
    ) -> None:
        self.adapter, self.layers, self.keys, self.fingerprints = (
            adapter,
            layers,
            keys,
            fingerprints,
        )
        self.latest: dict[str, list[Picture]] = {}
        self.finish: Callable[[list[Picture]], None] | None = None
        self._heard: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._wrapped: list[str] = []

    def install(self) -> None:
        """Start listening."""
        core = self.adapter.core
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            original = getattr(core, name, None)
            if original is not None:
                # A method and not a function inside a function: a copied model's encodes the copy.
                wrapped = functools.partial(
                    self._encode, original, inspect.signature(original), kind
                )
                vars(core)[name] = functools.update_wrapper(wrapped, original)
                self._wrapped.append(name)
        watched = dict.fromkeys((*self.layers, *(("feature",) if self.keys else ())))
        for which in watched:
            module = self.adapter.tower_attention(which)
            self._handles += watch(module, functools.partial(self._recorder, which))

    def remove(self) -> None:
        """Stop listening; the instance is as it was."""
        for name in self._wrapped:
            vars(self.adapter.core).pop(name, None)
        for handle in self._handles:
            handle.remove()
        self._wrapped.clear()
        self._handles.clear()
        self._heard.clear()
        self.latest = {}

    def _encode(
        self,
        original: Any,
        signature: inspect.Signature,
        kind: Literal["image", "video"],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In place of a core's ``original``, in the same manner."""
        self._heard.clear()
        output = original(*args, **kwargs)
        bound = signature.bind_partial(*args, **kwargs).arguments
        pictures = self.adapter.pictures({**bound.pop("kwargs", {}), **bound}, kind)
        if self.finish is not None:
            self.finish(pictures)
        features = getattr(output, "pooler_output", output)
        for picture, tensor in zip(pictures, features, strict=True):
            self._finish(picture)
            setattr(tensor, _MARK, picture)
        self.latest[kind] = pictures
        return output

    def _recorder(self, which: Layer) -> Record:
        # Nothing may be saved for backward: a checkpointed recomputation does not run this again.
        @torch.no_grad()
        def record(query: Tensor, key: Tensor, scale: float) -> None:
            if which in self.layers:
                rows = ops.attention_rows(query[:, :, :1], key, scale=scale)
                self._heard[which] = rows[:, :, 0, 1:]  # [pictures, H, patches]
            if which == "feature" and self.keys:
                self._heard["keys"] = key[:, :, 1:].mean(1)  # [pictures, patches, d]

        return record

    def _finish(self, picture: Picture) -> None:
        """Give a picture its own part of what was heard."""
        if self.fingerprints and picture.pixels is not None:
            picture.fingerprint = fingerprint(picture.pixels)
        picture.pixels = None
        if picture.source is None:
            return
        for which, heard in self._heard.items():
            if which == "keys":
                picture.vision_keys = heard.flatten(0, 1)[picture.source.to(heard.device)]
            else:
                flat = heard.transpose(0, 1).flatten(1)
                picture.cls_attention[which] = flat[:, picture.source.to(heard.device)]


def pictures_of(output: Any, kind: str) -> list[Picture]:
    """The pictures of features that were encoded earlier.

    Raises:
        ConfigError: the features carry none: another tool made them, or they were cut.
    """
    marks = [getattr(tensor, _MARK, None) for tensor in output.pooler_output]
    pictures = [mark for mark in marks if isinstance(mark, Picture)]
    if len(pictures) != len(marks):
        raise ConfigError(
            f"The {kind} features in mm_encoder_outputs do not say which picture they come from, "
            f"so they cannot be pruned. Make them with visprune.encode_images, or inside the run; "
            f"a prefill in chunks that cut a picture is not supported (prefill_chunk_size=None)."
        )
    return pictures
