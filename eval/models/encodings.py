# SPDX-License-Identifier: Apache-2.0
"""Pictures of a vision-language model, prepared and encoded once for all questions and methods.

A prompt then needs its token ids alone: a processor puts a run of ids in place of the picture's
placeholder, which depends on the picture and not on the words. That this is all that it does is
checked on each picture; where it is not, or where the model takes no encoded pictures, nothing is
shared and every prompt goes through the processor with its picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout
from visprune.errors import UnsupportedModel
from visprune.eval.models.base import Request
from visprune.eval.models.held import Held
from visprune.machine.run import Run
from visprune.machine.sharing import EncodedImages, encode_images, encodes_alike

__all__ = ["Encodings", "image_token"]

_ROOM = 2**30  # bytes of pictures and features
_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class _Prepared:
    """A picture as the processor makes it.

    Attributes:
        span: ids that stand for it in a prompt.
        images: the processor's tensors of it, on the model's device.
        typed: the prompt is accompanied by ``mm_token_type_ids``.
    """

    span: list[int]
    images: Mapping[str, Tensor]
    typed: bool


class Encodings:
    """Makes the inputs of a batch from pictures that are encoded once.

    Pictures are encoded one by one: in half precision features depend on what else was encoded
    with them, and a run that was stopped and goes on must see the same features.

    Args:
        model: the model.
        processor: its processor.
        adapter: its adapter; ``None``: nothing is shared.
    """

    def __init__(self, model: Any, processor: Any, adapter: VLMAdapter | None) -> None:
        self.model, self.processor, self.adapter = model, processor, adapter
        self.shares = adapter is not None and adapter.takes_encoded and adapter.proved
        self._prepared: Held[_Prepared] = Held(_ROOM // 2, _prepared_bytes)
        self._encoded: Held[EncodedImages] = Held(_ROOM // 2, lambda images: images.nbytes)

    def forget(self) -> None:
        """Drop what is held of pictures."""
        self._prepared.forget()
        self._encoded.forget()

    def batch(
        self, texts: Sequence[str], requests: Sequence[Request], run: Run | None
    ) -> tuple[dict[str, Any], list[ImageLayout]] | None:
        """The inputs of a batch, and where its pictures are.

        Args:
            texts: prompts with one placeholder for the picture.
            requests: what they were made of; pictures with the same ``digest`` are one.
            run: the method in force; one that acts inside the encoder has encodings of its own.

        Returns:
            ``None`` where nothing can be shared.
        """
        token = image_token(self.processor)
        if self.adapter is None or not self.shares or not all(map(_named, requests)):
            return None
        if any(text.count(token) != 1 for text in texts):
            return None
        prepared = []
        for text, request in zip(texts, requests, strict=True):
            known = self._prepare(text, request)
            if known is None:
                self.shares = False
                return None
            prepared.append(known)
        inputs = self._ids(texts, [one.span for one in prepared], typed=prepared[0].typed)
        try:
            each = [
                self._encode(one, request, run).features[0]
                for one, request in zip(prepared, requests, strict=True)
            ]
        except UnsupportedModel:  # no one tensor a picture (tiles), or more beside it
            self.shares = False
            return None
        encoded = EncodedImages(each)
        for name in prepared[0].images:
            if name != "pixel_values":
                inputs[name] = torch.cat([one.images[name] for one in prepared])
        layouts = self.adapter.layouts(inputs, {"image": encoded.pictures})
        return {**inputs, "mm_encoder_outputs": encoded.select()}, layouts

    def _prepare(self, text: str, request: Request) -> _Prepared | None:
        """The request's picture; ``None`` where the processor does more than was thought."""

        def make() -> _Prepared:
            made = self.processor(text=[text], images=[[request.image]], return_tensors="pt")
            made = dict(made.to(self.model.device, dtype=self._dtype))
            images = {k: v for k, v in made.items() if k not in _TEXT}
            span = self._span(text, made["input_ids"][0].tolist())
            one = _Prepared(span, images, typed="mm_token_type_ids" in made)
            again = self._ids([text], [span], typed=one.typed)
            texts = {k: v for k, v in made.items() if k in _TEXT}
            if not _same(texts, again) or "pixel_values" not in images:
                raise _Otherwise
            return one

        try:
            return self._prepared.get(request.digest, make)
        except _Otherwise:
            return None

    def _span(self, text: str, ids: list[int]) -> list[int]:
        """What the processor put in place of the placeholder of a prompt that became ``ids``."""
        short = self.processor.tokenizer(text)["input_ids"]
        if short.count(self._token_id) != 1:
            raise _Otherwise
        before = short.index(self._token_id)
        return ids[before : len(ids) - (len(short) - before - 1)]

    def _ids(
        self, texts: Sequence[str], spans: Sequence[list[int]], *, typed: bool
    ) -> dict[str, Any]:
        """Token ids of prompts with their pictures' ids in place, padded on the left."""
        shorts = self.processor.tokenizer(list(texts))["input_ids"]
        whole = []
        for short, span in zip(shorts, spans, strict=True):
            at = short.index(self._token_id)
            whole.append([*short[:at], *span, *short[at + 1 :]])
        made = self.processor.tokenizer.pad(
            {"input_ids": whole}, padding=True, padding_side="left", return_tensors="pt"
        )
        inputs = {name: made[name].to(self.model.device) for name in _TEXT[:2]}
        if typed:
            inputs[_TEXT[2]] = (inputs["input_ids"] == self._token_id).to(torch.int64)
        return inputs

    @property
    def _dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def _token_id(self) -> int | None:
        return None if self.adapter is None else self.adapter.token_id("image")

    def _encode(self, one: _Prepared, request: Request, run: Run | None) -> EncodedImages:
        own = None
        if run is not None and self.adapter is not None:
            own = encodes_alike(self.adapter, run.method)
        inputs: dict[str, Any] = dict(one.images)
        methods = None if own is None or run is None else [run.method]
        return self._encoded.get(
            (request.digest, own),
            lambda: encode_images(self.model, methods=methods, run=run, **inputs),
        )


class _Otherwise(Exception):
    """A processor that does more than write placeholders."""


def _named(request: Request) -> bool:
    return request.image is not None and request.digest is not None


def _same(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(
        value.shape == those[name].shape and bool((value == those[name]).all())
        for name, value in these.items()
    )


def _prepared_bytes(one: _Prepared) -> int:
    return sum(tensor.nbytes for tensor in one.images.values())


def image_token(processor: Any) -> str:
    """The placeholder of a picture in a prompt's text."""
    return str(getattr(processor, "image_token", "<image>"))
