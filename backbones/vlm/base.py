# SPDX-License-Identifier: Apache-2.0
"""What the machine asks of a model family: where its tokens are and what is indexed by token."""

from __future__ import annotations

import inspect
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import TowerAdapter
from visprune.core.method import ModelSpec
from visprune.cost.cost import ModelShape
from visprune.errors import ConfigError, UnsupportedModel


@dataclass
class Picture:
    """What is known of one image (or video) once it is encoded.

    Attributes:
        free: which of its tokens may be dropped, ``[n]`` bool (newline tokens may not).
        pos: (t, h, w) of the free tokens, ``[N, 3]``.
        source: encoder patch of each free token, counted over all encoder pictures of the call,
            ``[N]``; ``None`` where the encoder offers no signals.
        pixels: what the encoder saw; dropped once they are fingerprinted.
        kind: image or video.
        grids: (t, h, w) in patches of everything that the encoder saw of it.
        fingerprint: a number that depends on the pixels alone; 0 if not asked for.
        cls_attention: by encoder layer, class-token attention to the free tokens, ``[H, N]``.
        vision_keys: the feature layer's keys of the free tokens, mean over heads, ``[N, d]``.
        alive: where tokens left inside the encoder, the free tokens that stand for those that are
            left, in raster order, ``[K]``.
        size: patches merged into each of them, ``[K]``.
    """

    free: Tensor
    pos: Tensor
    source: Tensor | None
    pixels: Tensor | None
    kind: Literal["image", "video"] = "image"
    grids: tuple[tuple[int, int, int], ...] = ()
    fingerprint: int = 0
    cls_attention: dict[str, Tensor] = field(default_factory=dict)
    vision_keys: Tensor | None = None
    alive: Tensor | None = None
    size: Tensor | None = None

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """Largest t, h and w."""
        return tuple(self.pos.amax(0).tolist())


@dataclass
class ImageLayout:
    """One image of a batch, found in its sequence.

    Attributes:
        picture: what is known of it.
        row: sample that it belongs to.
        positions: places of its tokens in that row's input sequence, ``[n]``.
    """

    picture: Picture
    row: int
    positions: Tensor


def grid(t: int, h: int, w: int) -> Tensor:
    """(t, h, w) of every cell in raster order, ``[t*h*w, 3]``."""
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 3)


class VLMAdapter:
    """Base of the adapters; one instance per pruned model.

    Attributes:
        model: the ``...ForConditionalGeneration`` itself (unwrapped).
        core: the module that merges pictures into the text (``model.model``).
        language_model: the decoder, called with ``inputs_embeds``.
        layers: its layers.
    """

    model_types: tuple[str, ...] = ()
    multi_axis_rope = False

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.core: Any = model.model
        self.language_model: Any = self.core.language_model
        self.layers: list[Any] = list(self.language_model.layers)
        self._signature = inspect.signature(self.core.forward)
        self._check_layers()

    def _check_layers(self) -> None:
        types = getattr(self.text_config, "layer_types", None) or []
        window = getattr(self.text_config, "sliding_window", None)
        sliding = [i for i, t in enumerate(types) if t != "full_attention"]
        if sliding or (not types and window is not None):
            raise UnsupportedModel(
                f"Decoder layers {sliding or 'all'} of this {self.config.model_type} model use "
                f"{types[sliding[0]] if sliding else 'sliding-window'} attention; their caches "
                f"count tokens by a window that a shorter sequence would shift. Only "
                f"full-attention decoders are supported."
            )

    @property
    def text_config(self) -> Any:
        """Config of the decoder, as the decoder itself reads it."""
        return self.language_model.config

    @property
    def head(self) -> nn.Module:
        """The output head."""
        return self.model.get_output_embeddings()

    @property
    def has_cls(self) -> bool:
        """Whether the encoder has a class token."""
        return False

    @cached_property
    def spec(self) -> ModelSpec:
        """What methods may know."""
        return ModelSpec(
            family=self.config.model_type,
            num_layers=len(self.layers),
            has_cls=self.has_cls,
            multi_axis_rope=self.multi_axis_rope,
            vision_layers=0 if self.encoder is None else len(self.encoder.layers),
            vision_width=0 if self.encoder is None else self.encoder.width,
            vision_refusal=self.no_encoder,
        )

    @cached_property
    def encoder(self) -> TowerAdapter | None:
        """The image encoder, where tokens can leave inside it."""
        return None

    @property
    def no_encoder(self) -> str:
        """Why there is no :attr:`encoder`."""
        return "whether tokens can leave inside its vision encoder is not known"

    @property
    def encoder_end(self) -> int:
        """The encoder's layer whose output the model reads, 0-based."""
        raise NotImplementedError  # pragma: no cover - only with an encoder

    @property
    def projector(self) -> nn.Module:
        """What maps the encoder's tokens to the decoder's, one by one."""
        raise NotImplementedError  # pragma: no cover - only with an encoder

    @property
    def takes_encoded(self) -> bool:
        """Whether the model takes pictures that were encoded before (``mm_encoder_outputs``)."""
        return "mm_encoder_outputs" in self._signature.parameters

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name the arguments of a call of ``core``."""
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        return {**bound, **extra}

    def cost_shape(self) -> ModelShape:
        """Sizes of the whole model, for counting operations."""
        raise NotImplementedError  # pragma: no cover - abstract

    def tower_attention(self, which: Literal["last", "feature"]) -> nn.Module:
        """The encoder's attention module that a method's signals come from."""
        raise UnsupportedModel(f"{self.config.model_type} has no class token to read attention of.")

    def token_id(self, kind: Literal["image", "video"]) -> int | None:
        """Placeholder id in ``input_ids``."""
        name = f"{kind}_token_id"
        value = getattr(self.config, name, None)
        return value if value is not None else getattr(self.config, f"{kind}_token_index", None)

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
        for kind in ("image", "video"):
            if pictures.get(kind):
                found += self._place(call, kind, pictures[kind])
        return found

    def _place(self, call: dict[str, Any], kind: Literal["image", "video"],
               pictures: list[Picture]) -> list[ImageLayout]:  # fmt: skip
        places = self._placeholders(call, kind).nonzero()
        counts = [len(picture.free) for picture in pictures]
        if sum(counts) != len(places):
            raise ConfigError(
                f"The prompt holds {len(places)} {kind} placeholder tokens, its {len(pictures)} "
                f"{kind}s make {sum(counts)} tokens. Pass the processor's own outputs, whole."
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


def fingerprint(pixels: Tensor) -> int:
    """A number that depends on the values of ``pixels`` alone."""
    data = pixels.detach().to("cpu", torch.float32).contiguous()
    return zlib.crc32(data.numpy().tobytes())
