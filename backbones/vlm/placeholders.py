# SPDX-License-Identifier: Apache-2.0
"""Where a prompt shows its pictures: placeholders, compared with what the pictures become."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import Instead
from visprune.backbones.hf.features import lengths, unstacked
from visprune.backbones.vlm.picture import ImageLayout, Picture
from visprune.errors import ConfigError

_EXPAND = "_expand_inputs_for_generation"
_POSITIONS = "_prepare_position_ids_for_generation"
_KINDS: tuple[Literal["image", "video"], ...] = ("image", "video")
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Placeholders:
    """The pictures of a call of a model, and their places among its tokens.

    Attributes:
        model: the ``...ForConditionalGeneration`` itself (unwrapped).
        config: its config.
        core: the module that merges pictures into the text (``model.model``).
    """

    same_id: ClassVar[bool] = False
    """Whether clips are written with the placeholder of pictures: a call has one or the other."""

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.core: Any = self.find_core(model)
        self._signature = inspect.signature(self.core.forward)

    def find_core(self, model: Any) -> Any:
        """The module that merges pictures into the text."""
        return getattr(model, "model", None)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name the arguments of a call of ``core``."""
        if not args:  # as the models of transformers call it, and at every decoded token
            return dict(kwargs)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        return {**bound, **extra}

    def token_id(self, kind: Literal["image", "video"]) -> int | None:
        """Placeholder id in ``input_ids``."""
        kind = "image" if self.same_id else kind
        name = f"{kind}_token_id"
        value = getattr(self.config, name, None)
        return value if value is not None else getattr(self.config, f"{kind}_token_index", None)

    def guards(self) -> list[Any]:
        """Install what refuses a prompt that does not fit its pictures; returns what removes it.

        Before the model's own code meets it: that stops in other ways, or with other words.
        """
        handles: list[Any] = [
            self.core.register_forward_pre_hook(self._check_call, with_kwargs=True)
        ]
        # `generate` gives each beam its pictures by counting placeholders, and drops what is left.
        original = getattr(self.model, _EXPAND, None)
        if original is not None:
            handles.append(Instead(self.model, _EXPAND, partial(self._check_expand, original)))
        # Before that it counts positions, by families with axes from placeholders and grids.
        positions = getattr(self.model, _POSITIONS, None)
        if positions is not None:
            wrapped = partial(self._check_positions, positions)
            handles.append(Instead(self.model, _POSITIONS, wrapped))
        return handles

    def _check_expand(self, original: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's ``_expand_inputs_for_generation``."""
        ids = kwargs.get("input_ids")
        if ids is not None and ids.numel():
            self.check_placeholders(kwargs)
        with unstacked(kwargs.get("mm_encoder_outputs") or {}):
            return original(*args, **kwargs)

    def _check_positions(
        self, original: Any, /, inputs_tensor: Any, model_kwargs: dict[str, Any], **more: Any
    ) -> Any:
        """In place of the model's ``_prepare_position_ids_for_generation``."""
        try:
            return original(inputs_tensor, model_kwargs, **more)
        except Exception as error:
            call = {"input_ids": inputs_tensor, **model_kwargs}
            told = None if call["input_ids"].is_floating_point() else self.misfit(call)
            if told is None:
                raise
            raise told from error

    def _check_call(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of ``core``."""
        named = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
        if len(args) < 2 and all(kwargs.get(name) is None for name in named):
            return  # a step of decoding, or text alone
        call = self.bind(args, kwargs)
        if call.get("input_ids") is not None:
            self.check_placeholders(call)

    def check_placeholders(self, call: dict[str, Any]) -> None:
        """Compare the placeholders in ``input_ids`` with the pictures of a call.

        Raises:
            ConfigError: there are more or fewer than the pictures make tokens.
        """
        encoded = call.get("mm_encoder_outputs") or {}
        given = [k for k in _KINDS if any(x.get(y) is not None for x, y in
                                          ((encoded, k), (call, _PIXELS[k])))]  # fmt: skip
        if self.same_id and len(given) > 1:
            raise ConfigError(
                f"{self.config.model_type} writes clips with the placeholder of pictures, and "
                f"transformers does not tell them apart in one call. Give pictures or clips."
            )
        for kind in _KINDS:
            if encoded.get(kind) is not None:
                counts = lengths(encoded[kind])
            elif call.get(_PIXELS[kind]) is not None:
                known = self.counts(call, kind)
                if known is None:
                    continue  # compared once they are encoded
                counts = known
            else:
                continue
            found = int(self._placeholders(call, kind).sum())
            if found != sum(counts):
                raise mismatch(kind, found, counts, self.token_id(kind))

    def misfit(self, call: dict[str, Any]) -> ConfigError | None:
        """What is wrong with placeholders and grids of a prompt, before anything is encoded."""
        for kind in _KINDS:
            given = call.get(_PIXELS[kind]) is not None
            counts = self.promised(call, kind) if given else None
            if counts is None:
                continue
            found = int(self._placeholders(call, kind).sum())
            if found != sum(counts):
                return mismatch(kind, found, counts, self.token_id(kind))
        return None

    def promised(self, call: dict[str, Any], kind: Literal["image", "video"]) -> list[int] | None:
        """Tokens of each picture as its grid has it; ``None``: there are no grids."""
        return None

    def counts(self, call: dict[str, Any], kind: Literal["image", "video"]) -> list[int] | None:
        """Tokens that each picture of a call becomes, from its pixels and sizes.

        ``None`` where only encoding them tells.
        """
        return [len(picture.free) for picture in self.pictures(call, kind)]

    def pieces(
        self, call: dict[str, Any], kind: Literal["image", "video"], output: Any
    ) -> list[list[Picture]]:
        """What each feature tensor of an encoder's output holds, in order.

        Args:
            call: the arguments of ``get_image_features`` or ``get_video_features``.
            kind: which of them.
            output: what it returned.

        Returns:
            One list per tensor, whose tokens follow one another: of the one picture, of a tile of
            one, or of all pictures of a sample. What :meth:`joined` puts together is one picture.
        """
        return [[picture] for picture in self.pictures(call, kind)]

    def encodes(
        self,
        kind: Literal["image", "video"],
        given: dict[str, Any],
        call: dict[str, Any] | None,
    ) -> Literal["image", "video"]:
        """What is encoded by ``get_image_features`` or ``get_video_features``.

        Args:
            kind: which of them is called.
            given: its arguments.
            call: the arguments of ``core``, inside a call of it.
        """
        return kind

    def joined(self, call: dict[str, Any], layouts: list[ImageLayout]) -> list[ImageLayout]:
        """Put pieces together that a person would count as one picture (tiles)."""
        return layouts

    def pictures(self, call: dict[str, Any], kind: Literal["image", "video"]) -> list[Picture]:
        """The pictures of a call of ``get_image_features`` or ``get_video_features``."""
        raise NotImplementedError  # pragma: no cover - abstract

    def layouts(
        self, call: dict[str, Any], pictures: dict[str, list[Picture]]
    ) -> list[ImageLayout]:
        """Find every picture of a call of ``core`` in its sequence.

        Raises:
            ConfigError: placeholders and pictures do not match.
        """
        found: list[ImageLayout] = []
        for kind in _KINDS:
            if pictures.get(kind):
                found += self.joined(call, self._place(call, kind, pictures[kind]))
        return found

    def _place(self, call: dict[str, Any], kind: Literal["image", "video"],
               pictures: list[Picture]) -> list[ImageLayout]:  # fmt: skip
        places = self._placeholders(call, kind).nonzero()
        counts = [len(picture.free) for picture in pictures]
        if sum(counts) != len(places):
            raise mismatch(kind, len(places), counts, self.token_id(kind))
        ends = torch.tensor(counts).cumsum(0)[: len(places)]
        rows = places[:, 0].cpu()
        split = [n for n, end in enumerate(ends.tolist())
                 if counts[n] and rows[end - 1] != rows[end - counts[n]]]  # fmt: skip
        if split:
            raise ConfigError(
                f"Placeholders of {kind} {split[0]} lie in two samples: the {kind}s come in "
                f"another order than the samples that show them. (With beams, some families of "
                f"transformers repeat the {kind}s of a sample in the wrong order: give one picture "
                f"a sample, or do without beams.)"
            )
        return [
            ImageLayout(picture=picture, row=int(span[0, 0]), positions=span[:, 1])
            for picture, span in zip(pictures, places.split(counts), strict=True)
        ]

    def _placeholders(self, call: dict[str, Any], kind: Literal["image", "video"]) -> Tensor:
        token = self.token_id(kind)
        ids = call.get("input_ids")
        if ids is not None:
            return ids == token
        embeds = call["inputs_embeds"]
        wanted = self.model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        return (embeds == wanted).all(-1)


def mismatch(kind: str, found: int, counts: Sequence[int], token: int | None) -> ConfigError:
    """The error of a prompt whose placeholders do not fit its pictures."""
    few, number = found < sum(counts), len(counts)
    cause = (
        "it was cut off, as max_length and truncation=True do, or a picture was passed twice"
        if few
        else f"one was typed into its text, or stands there for {kind}s that were not passed"
    )
    return ConfigError(
        f"The prompt holds {found} {kind} placeholder tokens (id {token}), its {number} "
        f"{kind}{'s' * (number != 1)} make {sum(counts)}: {cause}. Pass the processor's own "
        f"outputs, whole; a text that quotes the placeholder has to spell it otherwise."
    )
