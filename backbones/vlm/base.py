# SPDX-License-Identifier: Apache-2.0
"""What the machine asks of a model family: where its tokens are and what is indexed by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visprune.backbones.cost.decoder import read_decoder
from visprune.backbones.cost.encoder import read_encoder, read_projector
from visprune.backbones.encoders.base import EncoderAdapter, Instead
from visprune.backbones.hf.features import lengths, unstacked
from visprune.backbones.vlm.deepstack import take_out
from visprune.core.method import ModelSpec
from visprune.core.signals.base import EncoderLayer, Signal
from visprune.cost.cost import ModelShape
from visprune.errors import ConfigError, UnsupportedModel

_EXPAND = "_expand_inputs_for_generation"
_SLIDING = "sliding_attention"
_KINDS: tuple[Literal["image", "video"], ...] = ("image", "video")


@dataclass
class Picture:
    """What is known of one image (or video) once it is encoded.

    Attributes:
        free: which of its tokens may be dropped, ``[n]`` bool (newline tokens may not).
        pos: (t, h, w) of the free tokens, ``[N, 3]``.
        source: encoder patch of each free token, counted over all encoder pictures of the call,
            ``[N]``, or of a token made of several, ``[N, m]``; ``None`` where the encoder offers no
            signals.
        pixels: what the encoder saw; dropped once methods' signals are read from them.
        kind: image or video.
        grids: (t, h, w) in patches of everything that the encoder saw of it.
        signals: what methods are shown of the encoder and the pixels, by signal; tensors with the
            free tokens along their first axis, ``[N, ...]``.
        alive: where tokens left inside the encoder, the free tokens that stand for those that are
            left, in raster order, ``[K]``.
        size: patches merged into each of them, ``[K]``.
        placed: how ``pos`` is known: ``"grid"``: from the grid that the encoder worked on;
            ``"guessed"``: from the number of tokens, in raster order; ``"queries"``: the tokens
            are no patches and stand in a line.
    """

    free: Tensor
    pos: Tensor
    source: Tensor | None
    pixels: Tensor | None
    kind: Literal["image", "video"] = "image"
    grids: tuple[tuple[int, int, int], ...] = ()
    signals: dict[Signal, Any] = field(default_factory=dict)
    alive: Tensor | None = None
    size: Tensor | None = None
    placed: Literal["grid", "guessed", "queries"] = "grid"

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

    multi_axis_rope = False

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.core: Any = model.model
        self.language_model: Any = self.find_decoder()
        self.layers: list[Any] = list(self.language_model.layers)
        self._signature = inspect.signature(self.core.forward)
        self._check_layers()

    def find_decoder(self) -> Any:
        """The decoder inside of :attr:`core`."""
        return self.core.language_model

    def _check_layers(self) -> None:
        kinds = [self.kind_of(layer) for layer in range(len(self.layers))]
        other = [n for n, kind in enumerate(kinds) if kind not in ("full_attention", _SLIDING)]
        if other:
            raise UnsupportedModel(
                f"Decoder layers {other} of this {self.config.model_type} model use "
                f"{kinds[other[0]]}; decoders with full and sliding-window attention are supported."
            )
        if self.windowed and str(self.text_config._attn_implementation) not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"This {self.config.model_type} model has sliding-window layers, whose window "
                f"{self.text_config._attn_implementation} counts in what is stored, not in tokens "
                f"that were seen. Use model.set_attn_implementation('sdpa')."
            )

    @cached_property
    def windowed(self) -> bool:
        """Whether masks differ from layer to layer, or are made before the decoder is called."""
        return any(self.window(layer) is not None for layer in range(len(self.layers)))

    @cached_property
    def takes_masks(self) -> bool:
        """Whether the decoder takes masks by kind of layer, ready made."""
        return getattr(self.text_config, "layer_types", None) is not None

    def window(self, layer: int) -> int | None:
        """How many tokens back a decoder layer sees, itself among them; ``None``: all."""
        size = getattr(self.text_config, "sliding_window", None)
        return size if self.kind_of(layer) == _SLIDING else None

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
            encoder_layers=0 if self.encoder is None else len(self.encoder.layers),
            encoder_width=0 if self.encoder is None else self.encoder.width,
            encoder_refusal=self.no_encoder,
            lacking=self.lacking,
        )

    @property
    def lacking(self) -> dict[str, str]:
        """By capability of signals, why the model has it not.

        Here: signals are read where the encoder can be reduced too.
        """
        if self.encoder is not None:
            return self.encoder.lacking
        return {"encoder_attention": self.no_encoder, "encoder_features": self.no_encoder}

    # Where the encoder is read -----------------------------------------------------------------

    @property
    def encoder_prefix(self) -> int:
        """Tokens before the patches in the encoder's layers."""
        return 0 if self.encoder is None else self.encoder.prefix

    def encoder_layer(self, which: EncoderLayer) -> int:
        """The 0-based number of a layer that a signal names.

        Raises:
            ConfigError: there is no such layer.
        """
        count = 0 if self.encoder is None else len(self.encoder.layers)
        number = {"last": count - 1, "feature": self.encoder_end}.get(str(which), which)
        if not isinstance(number, int) or not 0 <= number < count:
            raise ConfigError(
                f"Encoder layer {which!r} does not exist: the encoder of {self.config.model_type} "
                f"has {count} layers, 0 to {count - 1}. Give one of those, 'last' or 'feature'."
            )
        return number

    def watch_encoder(
        self, layer: int, record: Callable[[Tensor, Tensor, float], None]
    ) -> list[Any]:
        """Show queries and keys ``[P, H, T, d]`` of an encoder layer, and the scale of scores."""
        assert self.encoder is not None, "refused before"
        return self.encoder.watch(layer, record)

    def encoder_block(self, layer: int) -> nn.Module:
        """The module of an encoder layer, whose output leaves it."""
        assert self.encoder is not None, "refused before"
        return self.encoder.layers[layer].block

    # Where the decoder is read -----------------------------------------------------------------

    @property
    def maskless(self) -> bool:
        """Whether a single query that sees all keys is given no mask."""
        kernel = str(self.text_config._attn_implementation)
        return kernel == "sdpa" or kernel.startswith("flash")

    def kind_of(self, layer: int) -> str:
        """The kind of a decoder layer: layers of one kind share masks and rotary embeddings."""
        types = getattr(self.text_config, "layer_types", None)
        if types:
            return str(types[layer])
        window = getattr(self.text_config, "sliding_window", None)
        return "full_attention" if window is None else _SLIDING

    def rotary(self, hidden: Tensor, ids: Tensor, kind: str) -> Any:
        """The rotary embedding of position ids, for layers of a kind."""
        rotary = self.language_model.rotary_emb
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(hidden, ids, kind)
        return rotary(hidden, position_ids=ids)

    by_token: tuple[str, ...] = ()
    """Arguments of the decoder with one row a token, beside embeddings, mask and positions."""

    @cached_property
    def reads_positions(self) -> bool:
        """Whether attention modules scale queries by position ids, beside the rotary embedding."""
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        return "llama_4_scaling_beta" in rope

    @cached_property
    def adds_later(self) -> bool:
        """Whether the decoder adds features to visual tokens between its layers (DeepStack)."""
        takes = inspect.signature(self.language_model.forward).parameters
        return "deepstack_visual_embeds" in takes

    def later_features(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Take out of the decoder's arguments what it would add to visual tokens, by layer."""
        return take_out(kwargs) if self.adds_later else (kwargs, {})

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm behind the decoder's last layer."""
        return getattr(self.language_model, "norm", None)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.layers[layer].self_attn

    def layer_input(self, layer: Any, hidden: Tensor) -> Tensor:
        """What the attention of a decoder layer is given of the states that enter the layer."""
        return layer.input_layernorm(hidden)

    def qk_macs(self, layer: int) -> int:
        """Multiply-adds per token of a decoder layer's queries, keys and values."""
        config = self.text_config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
        return int(config.hidden_size * width)

    @cached_property
    def encoder(self) -> EncoderAdapter | None:
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

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name the arguments of a call of ``core``."""
        if not args:  # as the models of transformers call it, and at every decoded token
            return dict(kwargs)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        return {**bound, **extra}

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

    def token_id(self, kind: Literal["image", "video"]) -> int | None:
        """Placeholder id in ``input_ids``."""
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
        return handles

    def _check_expand(self, original: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's ``_expand_inputs_for_generation``."""
        ids = kwargs.get("input_ids")
        if ids is not None and ids.numel():
            self.check_placeholders(kwargs)
        with unstacked(kwargs.get("mm_encoder_outputs") or {}):
            return original(*args, **kwargs)

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
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
        for kind in _KINDS:
            if encoded.get(kind) is not None:
                counts = lengths(encoded[kind])
            elif call.get(pixels[kind]) is not None:
                known = self.counts(call, kind)
                if known is None:
                    continue  # compared once they are encoded
                counts = known
            else:
                continue
            found = int(self._placeholders(call, kind).sum())
            if found != sum(counts):
                raise mismatch(kind, found, counts, self.token_id(kind))

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
