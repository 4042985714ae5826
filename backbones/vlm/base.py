# SPDX-License-Identifier: Apache-2.0
"""What the machine asks of a model family: where its tokens are and what is indexed by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from visprune.backbones.cost.decoder import read_decoder
from visprune.backbones.cost.encoder import read_encoder, read_projector
from visprune.backbones.encoders.base import EncoderAdapter, Layer
from visprune.backbones.vlm.deepstack import take_out
from visprune.backbones.vlm.picture import Picture
from visprune.backbones.vlm.placeholders import Placeholders
from visprune.backbones.vlm.regions import Region
from visprune.backbones.vlm.seen import Canvas, fit_to_square
from visprune.core.method import ModelSpec
from visprune.core.signals.base import EncoderLayer
from visprune.core.site import Site
from visprune.cost.cost import ModelShape
from visprune.errors import ConfigError, UnsupportedModel

_SLIDING = "sliding_attention"
_INPUT_NORMS = ("input_layernorm", "operator_norm", "attention_layernorm")
# Kinds of layers that carry a state from token to token, or look at each token alone: no keys.
_RECURRENT = ("linear_attention", "conv", "mamba")
_KEYLESS = (*_RECURRENT, "mlp", "moe")


class VLMAdapter(Placeholders):
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

    multi_axis_rope = False
    proved = True
    """Whether the family was proved by tests; else a model is checked on its first prompt."""
    prompt_style: ClassVar[Literal["chat", "llava15"]] = "chat"
    markup: ClassVar[str | None] = None

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.language_model: Any = self.find_decoder()
        self.layers: list[Any] = list(self.language_model.layers)
        self._check_layers()

    def find_decoder(self) -> Any:
        """The decoder inside of :attr:`core`."""
        return self.core.language_model

    def _check_layers(self) -> None:
        kinds = [self.kind_of(layer) for layer in range(len(self.layers))]
        known = ("full_attention", _SLIDING, *_KEYLESS)
        other = [n for n, kind in enumerate(kinds) if kind not in known]
        if other or len(self.recurrent) == len(kinds):
            raise UnsupportedModel(
                f"Decoder layers {other or kinds} of this {self.config.model_type} model use "
                f"{kinds[other[0]] if other else kinds[0]}; decoders with full and sliding-window "
                f"attention are supported, with recurrent layers (linear attention, convolutions) "
                f"between them too."
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
    def recurrent(self) -> frozenset[int]:
        """Layers that carry a state from token to token: a token that left was never there.

        They keep no keys that could be hidden, so there is no other meaning to dropping: their
        state is that of the tokens that are left, in their order. Layers that look at each token
        alone are among them.
        """
        return frozenset(n for n in range(len(self.layers)) if self.kind_of(n) in _KEYLESS)

    @property
    def padding_counts(self) -> bool:
        """Whether recurrent layers add padding to their state, zeroed as it is (a bias does)."""
        return False

    def keeper(self, layer: int) -> int:
        """The layer whose cache holds what a layer attends to.

        Itself; of one that shares keys, the last of its kind that has its own. Of a recurrent
        layer, which attends to nothing, the first that does.
        """
        return self._keepers[layer]

    @cached_property
    def _keepers(self) -> list[int]:
        modes = getattr(self.text_config, "kv_sharing_modes", None) or []
        first = next(n for n in range(len(self.layers)) if n not in self.recurrent)
        last: dict[str, int] = {}
        found = []
        for layer in range(len(self.layers)):
            kind = self.kind_of(layer)
            if layer < len(modes) and modes[layer] == "reuse":
                found.append(last[kind])
                continue
            last[kind] = layer
            found.append(first if layer in self.recurrent else layer)
        return found

    @cached_property
    def deepest(self) -> int:
        """The last decoder layer at which tokens can leave.

        Behind the first layer whose keys others share, these would still see what left.
        """
        shared = [
            keeper
            for layer, keeper in enumerate(self._keepers)
            if keeper != layer and layer not in self.recurrent
        ]
        return min(shared, default=len(self.layers) - 1)

    @property
    def sees_both_ways(self) -> bool:
        """Whether masks that the core makes let tokens of a picture see those behind them."""
        return True

    # States of the decoder's layers ------------------------------------------------------------

    def as_rows(self, hidden: Tensor) -> Tensor:
        """What enters a decoder layer as one row a token, ``[B, S, ...]``."""
        return hidden

    def as_states(self, rows: Tensor) -> Tensor:
        """As the layer takes them: the reverse of :meth:`as_rows`."""
        return rows

    def shown(self, rows: Tensor) -> Tensor:
        """The features that methods are shown of rows, ``[B, S, D]``."""
        return rows

    @cached_property
    def layer_arguments(self) -> tuple[str, ...]:
        """Names of what a decoder layer takes behind its states."""
        return tuple(inspect.signature(self.layers[0].forward).parameters)[1:]

    def attention_arguments(self, layer: int) -> dict[str, Any]:
        """What the attention of a layer takes beside states, mask and positions."""
        return {}

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
            recurrent=self.recurrent,
            deepest=self.deepest,
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

    def find_sources(self, pictures: list[Picture]) -> None:
        """Say of pictures that were just encoded which patches their tokens are made of."""

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

    answer_types: ClassVar[dict[str, int]] = {}
    """Types of tokens that are generated, by argument, where they are not 0."""

    masks_before: ClassVar[bool] = False
    """Whether ``core`` makes masks for the decoder, of padding and of what is seen both ways."""

    def rope_of(self, layer: int) -> str:
        """Layers with the same share a rotary embedding."""
        return self.kind_of(layer)

    def rotary(self, hidden: Tensor, ids: Tensor, kind: str) -> Any:
        """The rotary embedding of position ids, for layers of a kind (:meth:`rope_of`)."""
        rotary = self.language_model.rotary_emb
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(hidden, ids, kind)
        return rotary(hidden, position_ids=ids)

    packed: Mapping[str, int] = MappingProxyType({})
    """Arguments in which pictures follow one another along another axis than the first."""

    by_token: tuple[str, ...] = ()
    """Arguments of the decoder with one row a token, beside embeddings, mask and positions."""

    @cached_property
    def reads_positions(self) -> bool:
        """Whether attention modules scale queries by position ids, beside the rotary embedding."""
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        return "llama_4_scaling_beta" in rope

    starts_empty: ClassVar[bool] = False
    """Whether visual tokens are zero until the decoder adds their features before a layer."""

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
        found = getattr(self.language_model, "norm", None)
        return getattr(self.language_model, "embedding_norm", None) if found is None else found

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.layers[layer].self_attn

    def layer_input(self, layer: Any, hidden: Tensor) -> Tensor:
        """What the attention of a decoder layer is given of the states that enter the layer."""
        for name in _INPUT_NORMS:
            norm = getattr(layer, name, None)
            if norm is not None:
                return norm(hidden)
        return hidden  # EXAONE 4 norms what leaves its attention

    def qk_macs(self, layer: int) -> int:
        """Multiply-adds per token of a decoder layer's queries, keys and values."""
        config = self.text_config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads * head
        made = getattr(getattr(self.attention(layer), "q_proj", None), "out_features", queries)
        queries = made if made == 2 * queries else queries  # Qwen3.5 makes a gate with them
        width = queries + 2 * config.num_key_value_heads * head
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

    @cached_property
    def heads_all(self) -> bool:
        """Whether the output head is applied to every token, in ``generate`` too."""
        return "logits_to_keep" not in inspect.signature(self.model.forward).parameters

    merges_vary = False
    """Whether each picture says what block of patches becomes a token; nothing but these is one."""

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
