# SPDX-License-Identifier: Apache-2.0
"""Listen to the image encoder: which picture became which features, and what its layers showed."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from visprune.backbones.hf.features import entries, mark, marks
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout, Picture
from visprune.core.signals.base import EncoderSeen, EncoderSignal, PictureSignal
from visprune.core.threads import PerThread
from visprune.errors import ConfigError


class _Current(PerThread):
    """What was encoded in this thread.

    Attributes:
        heard: signals of the encoding that is under way, by signal, ``[P, ...]``; or ``None``.
        latest: pictures of the core's call, by kind.
        byhand: pictures encoded outside of a call, not yet used: the pictures of each entry, the
            tensor that holds its features, and its number there (``None``: all of it).
        call: the arguments of the core, while a call of it is under way.
    """

    heard: dict[Any, Tensor] | None = None
    latest: dict[str, list[Picture]] | None = None
    byhand: list[tuple[list[Picture], weakref.ref[Tensor], int | None]] | None = None
    call: dict[str, Any] | None = None


class EncoderTap:
    """Wraps ``get_image_features`` and ``get_video_features`` of one model instance.

    Each feature tensor of the output carries its :class:`Picture`. ``generate`` encodes pictures
    before the first forward, repeats their features for beams and passes on nothing else, so this
    is where their sizes, pixels and attention can still be had.

    Args:
        adapter: the model family.
        signals: what is read of encoder layers.
        of_pixels: what is read of the pixels.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        signals: Sequence[EncoderSignal],
        of_pixels: Sequence[PictureSignal] = (),
    ) -> None:
        self.adapter, self.signals, self.of_pixels = adapter, signals, of_pixels
        self.finish: Callable[[list[Picture], Mapping[str, Any]], None] | None = None
        self._current = _Current()
        self._handles: list[Any] = []
        self._wrapped: dict[str, Any] = {}

    def install(self) -> None:
        """Start listening."""
        core = self.adapter.core
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            original = getattr(core, name, None)
            if original is not None:
                self._wrapped[name] = vars(core).get(name)
                # A method and not a function inside a function: a copied model's encodes the copy.
                wrapped = functools.partial(
                    self._encode, original, inspect.signature(original), kind
                )
                vars(core)[name] = functools.update_wrapper(wrapped, original)
        by_layer: dict[int, list[EncoderSignal]] = {}
        for signal in self.signals:
            by_layer.setdefault(self.adapter.encoder_layer(signal.layer), []).append(signal)
        for layer, signals in by_layer.items():
            attention = [s for s in signals if s.uses == "attention"]
            output = [s for s in signals if s.uses == "output"]
            if attention:
                record = functools.partial(self._attended, attention)
                self._handles += self.adapter.watch_encoder(layer, record)
            if output:
                hook = functools.partial(self._left, output)
                for block in self.adapter.encoder_blocks(layer):
                    self._handles.append(block.register_forward_hook(hook))

    def remove(self) -> None:
        """Stop listening; the instance is as it was."""
        for name, before in self._wrapped.items():
            if before is None:
                vars(self.adapter.core).pop(name, None)
            else:
                vars(self.adapter.core)[name] = before
        for handle in self._handles:
            handle.remove()
        self._wrapped.clear()
        self._handles.clear()

    # The call of the core ----------------------------------------------------------------------

    def begin(self, call: dict[str, Any]) -> None:
        """A call of the core begins."""
        self._current.latest, self._current.call = {}, call

    def end(self) -> None:
        """It is over, also after an error: what is encoded next is for another call."""
        self._current.call = None

    def pictures(self) -> dict[str, list[Picture]]:
        """What the call under way has encoded, by kind."""
        current = self._current
        found, current.call = dict(current.latest or {}), None
        if found:
            current.byhand = None
        return found

    def note(self, kind: Literal["image", "video"], pictures: list[Picture]) -> None:
        """The call under way encodes pictures where nothing is wrapped."""
        for picture in pictures:
            self._finish(picture, {})
        self._current.latest = {**(self._current.latest or {}), kind: pictures}

    def found(self, call: dict[str, Any]) -> list[ImageLayout]:
        """Pictures that were encoded by hand and whose features stand in ``inputs_embeds``."""
        embeds, current = call.get("inputs_embeds"), self._current
        if embeds is None or not current.byhand or embeds.shape[1] == 1:
            return []
        layouts, taken = [], set()
        for pieces, reference, number in current.byhand:
            features = reference()
            if features is None:
                continue
            features = features if number is None else features[number]
            wanted = features.detach().reshape(-1, features.shape[-1]).to(embeds)
            starts = (embeds[:, : embeds.shape[1] - len(wanted) + 1] == wanted[0]).all(-1).nonzero()
            for row, start in starts.tolist():
                span = slice(start, start + len(wanted))
                if (row, start) not in taken and torch.equal(embeds[row, span], wanted):
                    taken.add((row, start))
                    positions = torch.arange(start, start + len(wanted), device=embeds.device)
                    spans = positions.split([len(piece.free) for piece in pieces])
                    layouts += [
                        ImageLayout(piece, row, own)
                        for piece, own in zip(pieces, spans, strict=True)
                    ]
        layouts.sort(key=lambda layout: (layout.row, int(layout.positions[0])))
        return self.adapter.joined(call, layouts)

    def unplaced(self, call: dict[str, Any]) -> bool:
        """Whether pictures were encoded by hand, and this call was given merged embeddings."""
        embeds, current = call.get("inputs_embeds"), self._current
        prompt = call.get("input_ids") is None and embeds is not None and embeds.shape[1] > 1
        waiting, current.byhand = bool(current.byhand), None if prompt else current.byhand
        return waiting and prompt

    # Encoding ----------------------------------------------------------------------------------

    @torch.compiler.disable
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
        current = self._current
        if current.heard is not None:  # some families encode videos as images: one encoding
            return original(*args, **kwargs)
        current.heard = {}
        try:
            output = original(*args, **kwargs)
            heard = current.heard
        finally:
            current.heard = None
        bound = signature.bind_partial(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        if kind == "video" and "pixel_values" in given:  # its name in older transformers
            given.setdefault("pixel_values_videos", given["pixel_values"])
        kind = self.adapter.encodes(kind, given, current.call)
        pieces = self.adapter.pieces(given, kind, output)
        pictures = [piece for entry in pieces for piece in entry]
        self.adapter.find_sources(pictures)
        if self.finish is not None:
            self.finish(pictures, given)
        for picture in pictures:
            self._finish(picture, heard)
        mark(output, pieces)
        if current.call is not None:
            self._check(current.call, kind, output)
            current.latest = {**(current.latest or {}), kind: pictures}
        else:
            current.byhand = [*(current.byhand or ()), *_refer(pieces, entries(output))][-64:]
        return output

    def _check(self, call: dict[str, Any], kind: Literal["image", "video"], output: Any) -> None:
        """Compare the placeholders of the call under way with what was encoded for it."""
        if call.get("input_ids") is not None:
            self.adapter.check_placeholders(
                {"input_ids": call["input_ids"], "mm_encoder_outputs": {kind: output}}
            )

    @torch.no_grad()
    def _attended(
        self, signals: list[EncoderSignal], query: Tensor, key: Tensor, scale: float
    ) -> None:
        # Nothing may be saved for backward: a checkpointed recomputation does not run this again.
        self._hear(signals, query=query, key=key, scale=scale)

    @torch.no_grad()
    def _left(self, signals: list[EncoderSignal], block: Any, args: Any, output: Any) -> None:
        self._hear(signals, hidden=output[0] if isinstance(output, tuple) else output)

    def _hear(self, signals: list[EncoderSignal], **shown: Any) -> None:
        heard = self._current.heard
        if heard is None:
            return
        seen = EncoderSeen(self.adapter.encoder_prefix, self.adapter.has_cls, **shown)
        for signal in signals:
            heard[signal] = signal.read(seen)

    def _finish(self, picture: Picture, heard: dict[Any, Tensor]) -> None:
        """Give a picture its own part of what was heard: ``[n, ...]``, its free tokens first."""
        if picture.pixels is not None:
            for signal in self.of_pixels:
                picture.signals[signal] = signal.read(picture.pixels)
        picture.pixels = None
        if picture.source is None:
            return
        for signal, value in heard.items():
            patches = value.movedim(signal.token_dim, 1).flatten(0, 1)  # [P * N, ...]
            own = patches[picture.source.to(patches.device)]
            if picture.source.dim() == 1:
                picture.signals[signal] = own
            elif picture.weight is None:  # of a token that is made of several patches, their mean
                picture.signals[signal] = own.mean(1)
            else:
                part = picture.weight.to(own).view(*own.shape[:2], *[1] * (own.dim() - 2))
                picture.signals[signal] = (own * part).sum(1)


@contextmanager
def listening(adapter: VLMAdapter) -> Iterator[list[Picture]]:
    """Note the pictures that a model encodes meanwhile, in order; nothing is pruned."""
    heard: list[Picture] = []
    tap = EncoderTap(adapter, ())
    tap.finish = lambda pictures, given: heard.extend(pictures)
    tap.install()
    try:
        yield heard
    finally:
        tap.remove()


def _refer(
    pieces: list[list[Picture]], features: Tensor | Sequence[Tensor]
) -> list[tuple[list[Picture], weakref.ref[Tensor], int | None]]:
    """The pictures of each entry with where its features are, without keeping those alive."""
    if isinstance(features, Tensor):
        whole = weakref.ref(features)
        if features.dim() == 2:  # the tokens of all in one line
            return [([piece for own in pieces for piece in own], whole, None)]
        return [(own, whole, number) for number, own in enumerate(pieces)]
    each = zip(pieces, features, strict=True)
    return [(own, weakref.ref(tensor), None) for own, tensor in each]


def pictures_of(output: Any, kind: str) -> list[Picture]:
    """The pictures of features that were encoded earlier.

    Raises:
        ConfigError: the features carry none: another tool made them, or they were cut.
    """
    known = marks(output)
    if known is None:
        raise ConfigError(
            f"The {kind} features in mm_encoder_outputs do not say which picture they come from, "
            f"so they cannot be pruned. Make them with visprune.encode_images, or inside the run; "
            f"a prefill in chunks that cut a picture is not supported (prefill_chunk_size=None)."
        )
    return [picture for entry in known for picture in entry]
