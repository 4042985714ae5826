# SPDX-License-Identifier: Apache-2.0
"""What the machine asks of a family's decoder: its layers, and what is indexed by token there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from visprune.backbones.vlm.deepstack import take_out
from visprune.backbones.vlm.placeholders import Placeholders
from visprune.errors import UnsupportedModel

_SLIDING = "sliding_attention"
_INPUT_NORMS = ("input_layernorm", "operator_norm", "attention_layernorm")
# Kinds of layers that carry a state from token to token, or look at each token alone: no keys.
_RECURRENT = ("linear_attention", "conv", "mamba")
_KEYLESS = (*_RECURRENT, "mlp", "moe")


class DecoderAdapter(Placeholders):
    """The decoder of one model.

    Attributes:
        language_model: the decoder, called with ``inputs_embeds``.
        layers: its layers.
    """

    multi_axis_rope = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.language_model: Any = self.find_decoder()
        self.layers: list[Any] = list(self.language_model.layers)
        self._check_layers()

    @property
    def continues(self) -> bool:
        """Whether text that is put to a cache that ends with a picture is as in one prompt."""
        return True

    def find_decoder(self) -> Any:
        """The decoder inside of :attr:`core`."""
        return self.core.language_model

    merges_inside: ClassVar[bool] = False
    """Whether the decoder is :attr:`core` itself and puts pictures into the text in its forward."""

    def embedded(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], note: Callable[..., None]
    ) -> dict[str, Any]:
        """The arguments of a call of the decoder, with embeddings in place of ids.

        Args:
            args: of the call.
            kwargs: of the call.
            note: to be told ``(kind, pictures)`` of what was encoded here.
        """
        given = dict(kwargs)
        ids = given.pop("input_ids", None)
        ids = args[0] if ids is None else ids
        return {**given, "inputs_embeds": self.language_model.get_input_embeddings()(ids)}

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
        # Those behind this one share. (Newer configs say so by layer too: kv_sharing_modes.)
        own = len(self.layers) - (getattr(self.text_config, "num_kv_shared_layers", None) or 0)
        first = next(n for n in range(len(self.layers)) if n not in self.recurrent)
        last: dict[str, int] = {}
        found = []
        for layer in range(len(self.layers)):
            kind = self.kind_of(layer)
            if layer >= own > 0:
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

    # Kinds of layers, rotary embeddings, arguments ---------------------------------------------

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

    @property
    def head_width(self) -> int:
        """Features of a head."""
        config = self.text_config
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    @property
    def key_heads(self) -> int:
        """Key heads of a layer; 0 where its cache holds one latent for all of them."""
        config = self.text_config
        if getattr(config, "kv_lora_rank", None) is not None:
            return 0
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def qk_macs(self, layer: int, *, values: bool = True) -> int:
        """Multiply-adds per token of a decoder layer's queries, keys and, if asked for, values."""
        config, head = self.text_config, self.head_width
        queries = config.num_attention_heads * head
        made = getattr(getattr(self.attention(layer), "q_proj", None), "out_features", queries)
        queries = made if made == 2 * queries else queries  # Qwen3.5 makes a gate with them
        width = queries + (1 + values) * config.num_key_value_heads * head
        return int(config.hidden_size * width)

    @property
    def before_layers(self) -> bool:
        """Whether the decoder multiplies tokens with matrices before its first layer."""
        return False

    @cached_property
    def heads_all(self) -> bool:
        """Whether the output head is applied to every token, in ``generate`` too."""
        return "logits_to_keep" not in inspect.signature(self.model.forward).parameters
