# SPDX-License-Identifier: Apache-2.0
"""What each layer of a model costs, as plain numbers: per token, per pair, per key.

Whatever a layer is made of (grouped heads, latents, experts, recurrence), these numbers say what it
does with one more token; how many tokens there are is not known here. They are read from the
modules themselves (:mod:`visprune.backbones.cost`) or follow from sizes
(:mod:`visprune.cost.shapes`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields

from visprune.errors import ConfigError


def as_count(name: str, value: object, minimum: int = 0) -> int:
    """Return ``value`` as a Python int.

    Args:
        name: What is counted, for the message.
        value: An int, or anything that is one exactly (a NumPy integer, a 0-d integer tensor).
        minimum: The smallest value allowed.

    Raises:
        ConfigError: ``value`` is not a whole number or is below ``minimum``.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ConfigError(
            f"{name} must be a whole number of at least {minimum}, got {value!r}. "
            "Costs are counted from real token counts, not from averages."
        )
    return number


def check_counts(counts: object, names: Iterable[str], minimum: int = 1) -> None:
    """Raise ``ConfigError`` unless each named field of ``counts`` is a whole number."""
    for name in names:
        as_count(f"{type(counts).__name__}.{name}", getattr(counts, name), minimum=minimum)


def _check(counts: object) -> None:
    """Check every field that is a plain number; a window may be ``None``."""
    for field in fields(counts):  # type: ignore[arg-type]
        value = getattr(counts, field.name)
        if field.name == "window":
            if value is not None:
                check_counts(counts, ["window"])
        elif not isinstance(value, tuple | bool):
            check_counts(counts, [field.name], minimum=0)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of a causal decoder.

    Args:
        token: Multiply-adds for each token that enters: every matrix it is multiplied with; of
            experts, those that it is sent to.
        pair: Multiply-adds for each pair of a query and a key that it sees: both products.
        key: Multiply-adds for each key of a call, stored ones included: what is done anew with the
            whole cache (latents that are unfolded into keys and values).
        cache: Numbers stored for each token.
        state: Numbers stored whatever the length (a recurrent layer).
        window: Most keys that a query sees, itself included; ``None``: all.
        last_rows: Whether a prefill runs it for the tokens alone that the head is applied to: all
            layers from here on read the keys of earlier ones.

    Raises:
        ConfigError: A number is negative or not whole, or ``window`` is below 1.
    """

    token: int
    pair: int = 0
    key: int = 0
    cache: int = 0
    state: int = 0
    window: int | None = None
    last_rows: bool = False

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Decoder:
    """A causal decoder and its head.

    Args:
        layers: Its layers, which may differ.
        head: Multiply-adds of the language-model head for each row.

    Raises:
        ConfigError: ``head`` is negative or not whole, or there is no layer.
    """

    layers: tuple[DecoderLayer, ...]
    head: int

    def __post_init__(self) -> None:
        _check(self)
        if not self.layers:
            raise ConfigError("Decoder.layers is empty; give one DecoderLayer per layer.")

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)


@dataclass(frozen=True)
class EncoderLayer:
    """One layer of an image encoder, attention in both directions.

    Args:
        attention: Multiply-adds for each token that enters: the projections of attention.
        mlp: Multiply-adds for each token behind attention, where a method may have taken some.
        pair: Multiply-adds for each pair of tokens that attend: both products.
        window: Side of an attention window, in patches; ``None``: a frame attends to itself.

    Raises:
        ConfigError: A number is negative or not whole, or ``window`` is below 1.
    """

    attention: int
    mlp: int
    pair: int
    window: int | None = None

    def __post_init__(self) -> None:
        _check(self)

    def macs(self, tokens: int, pairs: int, mlp_tokens: int) -> int:
        """Multiply-adds of one picture.

        Args:
            tokens: Tokens that enter.
            pairs: Pairs of a query and a key.
            mlp_tokens: Tokens behind attention.
        """
        return tokens * self.attention + pairs * self.pair + mlp_tokens * self.mlp


@dataclass(frozen=True)
class Encoder:
    """An image encoder: patches are embedded, then pass its layers.

    Args:
        layers: Layers that run. transformers runs every layer of LLaVA's tower, also those behind
            ``vision_feature_layer``.
        patch: Multiply-adds of the embedding for each patch.
        prefix: Tokens of each frame that are no patch (a class token, registers).
        pooled: Multiply-adds of a pooling head behind the layers (SigLIP's runs though LLaVA does
            not read it), without those for each token.
        pooled_token: The same for each token that it pools.

    Raises:
        ConfigError: A number is negative or not whole, or windows meet a prefix (which window it
            would belong to is not defined).
    """

    layers: tuple[EncoderLayer, ...]
    patch: int
    prefix: int = 0
    pooled: int = 0
    pooled_token: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if self.prefix and any(layer.window is not None for layer in self.layers):
            raise ConfigError(
                f"Encoder layers with windows need prefix=0, got prefix={self.prefix}: which "
                "window a class token belongs to is not defined."
            )

    @property
    def num_layers(self) -> int:
        """Encoder layers."""
        return len(self.layers)


@dataclass(frozen=True)
class Projector:
    """What stands between encoder and decoder.

    Args:
        macs_per_token: Multiply-adds for each token that comes out.
        merge: Side of the block of patches that becomes one token.
        keeps_cls: The class token is projected too.
        row: Multiply-adds for each row of tokens, of a newline behind it that passes some layers.

    Raises:
        ConfigError: A number is negative or not whole, or ``merge`` is below 1.
    """

    macs_per_token: int
    merge: int = 1
    keeps_cls: bool = False
    row: int = 0

    def __post_init__(self) -> None:
        _check(self)
        check_counts(self, ["merge"])
