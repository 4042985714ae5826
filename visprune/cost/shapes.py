# SPDX-License-Identifier: Apache-2.0
"""The sizes that decide what a plain model costs, for pricing one that is not at hand."""

from __future__ import annotations

from dataclasses import dataclass

from visprune.cost.layers import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Projector,
    as_count,
    check_counts,
)
from visprune.errors import ConfigError

_ATTENTION_SIZES = ("num_layers", "hidden_size", "num_heads", "head_dim", "ffn_size")


@dataclass(frozen=True)
class DecoderShape:
    """A causal text decoder: grouped-query attention, then an MLP, in every layer.

    Args:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_dim: Width of one head; ``num_heads * head_dim`` may differ from ``hidden_size``.
        ffn_size: Inner width of the MLP.
        vocab_size: Rows of the language-model head.
        gated_mlp: Three matrices (gate, up, down: SwiGLU) instead of two.
        windows: Sliding-window length of each layer, ``None`` where it attends to everything.
            Empty: no layer has a window.

    Raises:
        ConfigError: A size is not a positive integer, ``num_kv_heads`` does not divide
            ``num_heads``, or ``windows`` has another length than ``num_layers``.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    gated_mlp: bool = True
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, [*_ATTENTION_SIZES, "num_kv_heads", "vocab_size"])
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}."
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(
                f"windows needs one entry per layer ({self.num_layers}) or none, "
                f"got {len(self.windows)}."
            )
        for window in self.windows:
            if window is not None:
                as_count("DecoderShape.windows", window, minimum=1)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (the value heads have the same)."""
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """Return the sliding-window length of ``layer``, ``None`` where it has none."""
        return self.windows[layer] if self.windows else None

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        """What each layer costs."""
        width, query, kv = self.hidden_size, self.query_size, self.kv_size
        mlp = (3 if self.gated_mlp else 2) * width * self.ffn_size
        token = 2 * width * (query + kv) + mlp
        return tuple(
            DecoderLayer(token=token, pair=2 * query, cache=2 * kv, window=self.window(layer))
            for layer in range(self.num_layers)
        )

    @property
    def head(self) -> int:
        """Multiply-adds of the language-model head for each row."""
        return self.hidden_size * self.vocab_size


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer over non-overlapping patches, attention in both directions.

    Args:
        num_layers: Layers that run. transformers runs every layer of LLaVA's tower, also those
            behind ``vision_feature_layer``.
        hidden_size: Width of the residual stream.
        num_heads: Attention heads.
        head_dim: Width of one head.
        ffn_size: Inner width of the MLP.
        patch_dim: Input numbers of one patch: channels × pixels (× frames of a temporal patch).
        gated_mlp: Three matrices in the MLP instead of two.
        has_cls: One more token per frame, which is no patch.
        window: Side of an attention window, in patches.
        windowed_layers: 0-based layers that attend only within windows (Qwen2.5-VL).

    Raises:
        ConfigError: A size is not a positive integer, a windowed layer does not exist, windows are
            named without a side, or a tower with windows has a CLS token (no known model does;
            which window it would belong to is not defined).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    ffn_size: int
    patch_dim: int
    gated_mlp: bool = False
    has_cls: bool = False
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, [*_ATTENTION_SIZES, "patch_dim"])
        if self.window is not None:
            as_count("VisionShape.window", self.window, minimum=1)
        if not self.windowed_layers:
            return
        if self.window is None or self.has_cls:
            raise ConfigError(
                f"windowed_layers={self.windowed_layers} needs window=<side in patches> and "
                f"has_cls=False, got window={self.window}, has_cls={self.has_cls}."
            )
        outside = [layer for layer in self.windowed_layers if layer not in range(self.num_layers)]
        if outside:
            raise ConfigError(
                f"windowed_layers names {outside}, but layers are 0 to {self.num_layers - 1}."
            )

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def layers(self) -> tuple[EncoderLayer, ...]:
        """What each layer costs."""
        width, heads = self.hidden_size, self.attention_size
        mlp = (3 if self.gated_mlp else 2) * width * self.ffn_size
        windowed = set(self.windowed_layers)
        return tuple(
            EncoderLayer(4 * width * heads, mlp, 2 * heads, self.window if i in windowed else None)
            for i in range(self.num_layers)
        )

    @property
    def patch(self) -> int:
        """Multiply-adds of the embedding for each patch."""
        return self.patch_dim * self.hidden_size

    @property
    def prefix(self) -> int:
        """Tokens of each frame that are no patch."""
        return int(self.has_cls)

    @property
    def pooled(self) -> int:
        """No pooling head."""
        return 0

    pooled_token = pooled


@dataclass(frozen=True)
class ProjectorShape:
    """The linear layers between the vision tower and the decoder.

    Args:
        layers: ``(in_features, out_features)`` of each linear layer, applied to every token.
        merge: Side of the block of patches that becomes one token (Qwen's merger: 2).
        keeps_cls: The CLS token is projected too (LLaVA's ``"full"`` select strategy).

    Raises:
        ConfigError: A size is not a positive integer.
    """

    layers: tuple[tuple[int, int], ...]
    merge: int = 1
    keeps_cls: bool = False

    def __post_init__(self) -> None:
        check_counts(self, ["merge"])
        for layer in self.layers:
            for size in layer:
                as_count("ProjectorShape.layers", size, minimum=1)

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds for one token that comes out."""
        return sum(inner * outer for inner, outer in self.layers)


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model: what one forward call runs through."""

    decoder: DecoderShape | Decoder
    vision: VisionShape | Encoder
    projector: ProjectorShape | Projector
