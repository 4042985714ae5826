# SPDX-License-Identifier: Apache-2.0
"""What the machine asks of a model family: decoder, encoder, what a picture is, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from visprune.backbones.cost.decoder import read_decoder
from visprune.backbones.cost.encoder import read_encoder, read_projector
from visprune.backbones.encoders.base import EncoderAdapter, Layer
from visprune.backbones.vlm.decoder import DecoderAdapter
from visprune.backbones.vlm.known import BEFORE
from visprune.backbones.vlm.packed_tower import PackedTower, why_not_packed
from visprune.backbones.vlm.picture import Picture
from visprune.backbones.vlm.regions import Region
from visprune.backbones.vlm.seen import Canvas, fit_to_square
from visprune.core.method import ModelSpec
from visprune.core.signals.base import EncoderLayer
from visprune.core.site import Site
from visprune.cost.cost import ModelShape
from visprune.errors import ConfigError


class VLMAdapter(DecoderAdapter):
    """Base of the adapters; one instance per pruned model.

    Attributes:
        model: the ``...ForConditionalGeneration`` itself (unwrapped).
        core: the module that merges pictures into the text (``model.model``).
        language_model: the decoder, called with ``inputs_embeds``.
        layers: its layers.
        prompt_style: how the family is asked: by a chat template, or in LLaVA-1.5's words.
        markup: what was put around a prompt (``<image>``, ``{prompt}``) in its training, where its
            processor's chat template is not that; ``None``: the template counts.
    """

    proved = True
    """Whether the family was proved by tests; else a model is checked on its first prompt."""
    prompt_style: ClassVar[Literal["chat", "llava15"]] = "chat"
    markup: ClassVar[str | None] = None

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
            encoder_layers=0 if self.encoder is None else len(self.encoder.layers),
            encoder_width=0 if self.encoder is None else self.encoder.width,
            encoder_end=None if self.encoder is None else self.encoder_end,
            encoder_refusal=self.no_encoder,
            patch_refusal=self.no_packed_tower,
            lacking=self.lacking,
            recurrent=self.recurrent,
            deepest=self.deepest,
            decoder_width=int(self.text_config.hidden_size),
            key_heads=self.key_heads,
            key_width=2 * self.head_width,
        )

    @property
    def lacking(self) -> dict[str, str]:
        """By capability of signals, why the model has it not.

        Here: signals are read where the encoder can be reduced too.
        """
        if self.encoder is not None:
            return self.encoder.lacking
        return {"encoder_attention": self.no_encoder, "encoder_features": self.no_encoder}

    def regions(self, count: int, size: tuple[int, int]) -> list[Region]:
        """What the values of ``t`` of a picture's tokens are, for drawings.

        Args:
            count: how many there are.
            size: width and height of the picture.
        """
        if count == 2:
            return [Region("thumbnail"), Region("full picture")]
        return [Region("full picture")] * count

    # Where the encoder is read -----------------------------------------------------------------

    @property
    def read_encoder(self) -> Any:
        """The encoder as signals are read of it, ``None`` where they are not."""
        return self.encoder

    @property
    def encoder_prefix(self) -> int:
        """Tokens before the patches in the encoder's layers."""
        return 0 if self.read_encoder is None else self.read_encoder.prefix

    def encoder_layer(self, which: EncoderLayer) -> int:
        """The 0-based number of a layer that a signal names.

        Raises:
            ConfigError: there is no such layer.
        """
        count = 0 if self.read_encoder is None else len(self.read_encoder.layers)
        number = {"last": count - 1, "feature": self.encoder_end}.get(str(which), which)
        if isinstance(number, float) and 0.0 < number < 1.0:
            number = Site.encoder(number).resolve(count)
        if not isinstance(number, int) or not 0 <= number < count:
            raise ConfigError(
                f"Encoder layer {which!r} does not exist: the encoder of {self.config.model_type} "
                f"has {count} layers, 0 to {count - 1}. Give one of those, a fraction of the "
                f"depth, 'last' or 'feature'."
            )
        return number

    def watch_encoder(
        self, layer: int, record: Callable[[Tensor, Tensor, float], None]
    ) -> list[Any]:
        """Show queries and keys ``[P, H, T, d]`` of an encoder layer, and the scale of scores."""
        assert self.read_encoder is not None, "refused before"
        return self.read_encoder.watch(layer, record)

    def encoder_block(self, layer: int) -> nn.Module:
        """The module of an encoder layer, whose output leaves it."""
        assert self.read_encoder is not None, "refused before"
        found: Any = self.read_encoder.layers[layer]
        return found.block if isinstance(found, Layer) else found

    def encoder_blocks(self, layer: int) -> list[nn.Module]:
        """The same, of an encoder of pictures and another of clips both."""
        return [self.encoder_block(layer)]

    def find_sources(self, pictures: list[Picture]) -> None:
        """Say of pictures that were just encoded which patches their tokens are made of."""

    @cached_property
    def packed_tower(self) -> PackedTower | None:
        """The vision encoder, where patches can be left out before it."""
        if self.config.model_type not in BEFORE or why_not_packed() is not None:
            return None
        return PackedTower(self.tower, self.merge)

    @property
    def no_packed_tower(self) -> str:
        """Why there is no :attr:`packed_tower`; empty where there is one."""
        if self.config.model_type in BEFORE:
            return why_not_packed() or ""
        if self.encoder is not None:
            return "its encoder is given whole pictures, and numbers all patches of a grid"
        return ModelSpec.patch_refusal

    packed: Mapping[str, int] = MappingProxyType({})
    """Arguments in which pictures follow one another along another axis than the first."""

    @cached_property
    def encoder(self) -> EncoderAdapter | None:
        """The image encoder, where tokens can leave inside it."""
        return None

    @property
    def no_encoder(self) -> str:
        """Why there is no :attr:`encoder`."""
        return "whether tokens can leave inside its vision encoder is not known"

    @property
    def whole_from(self) -> Literal["encoder", "projector"]:
        """What is followed by the whole grid, where tokens left inside the encoder.

        The projector, where it maps tokens one by one, so that it has fewer too.
        """
        return "projector" if self.merge == 1 else "encoder"

    @property
    def encoder_end(self) -> int:
        """The encoder's layer whose output the model reads, 0-based."""
        raise NotImplementedError  # pragma: no cover - only with an encoder

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        raise NotImplementedError  # pragma: no cover - abstract

    @property
    def projector(self) -> nn.Module:
        """What maps the encoder's tokens to the decoder's: one by one, or ``merge`` squared."""
        raise NotImplementedError  # pragma: no cover - abstract

    @property
    def projecting(self) -> list[nn.Module]:
        """All that works on the projector's tokens, for counting: modules beside it too."""
        return [self.projector]

    @property
    def merge(self) -> int:
        """Side of the block of patches that the projector makes one token of."""
        return int(getattr(self.tower, "spatial_merge_size", 1))

    @property
    def keeps_cls(self) -> bool:
        """Whether the class token is among the visual tokens."""
        return False

    @property
    def takes_encoded(self) -> bool:
        """Whether the model takes pictures that were encoded before (``mm_encoder_outputs``)."""
        return "mm_encoder_outputs" in self._signature.parameters

    def fit(self, image_processor: Any, canvas: Canvas) -> None:
        """Do to a canvas what the processor does to a picture: where the grid of tokens lies.

        A canvas that is left as it is: the grid covers the picture, squeezed to whole patches at
        most.
        """
        fit_to_square(image_processor, canvas)

    def cost_shape(self) -> ModelShape:
        """What the whole model costs by token, read from its own modules as they are now.

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        projectors = self.projecting
        return ModelShape(
            decoder=read_decoder(self.layers, self.head, self.text_config),
            vision=read_encoder(self.tower, projectors),
            projector=read_projector(
                projectors, self.tower, merge=self.merge, keeps_cls=self.keeps_cls
            ),
        )
