# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds (MACs) of each part of a vision-language model, from the counts of tokens.

What a layer costs for each token, pair and key stands in :mod:`visprune.cost.layers`.
:mod:`visprune.cost.cost` says what is counted and what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from visprune.cost.layers import Decoder, DecoderLayer, Encoder, Projector, as_count
from visprune.cost.shapes import DecoderShape, ProjectorShape, VisionShape
from visprune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

Causal = Literal["ideal", "dense"]


def per_layer(name: str, counts: int | Iterable[int], num_layers: int) -> list[int]:
    """Return one count per layer; a single number stands for every layer.

    Raises:
        ConfigError: A negative or fractional count, or another number of layers.
    """
    # A 0-d tensor or array has __iter__ too; its shape is empty.
    if not isinstance(counts, Iterable) or getattr(counts, "shape", None) == ():
        return [as_count(name, counts)] * num_layers
    listed = [as_count(name, count) for count in counts]
    if len(listed) != num_layers:
        raise ConfigError(
            f"{name} needs one count for each of the {num_layers} layers, got {len(listed)}."
        )
    return listed


def visible_pairs(
    tokens: int, cached: int = 0, *, causal: Causal = "ideal", window: int | None = None
) -> int:
    """Count the (query, key) pairs of one causal attention.

    Args:
        tokens: Queries; each also brings a key.
        cached: Keys that were there before, visible to every query.
        causal: ``"ideal"``: a query is paired with what it sees, itself included, as a kernel does
            that skips masked blocks. ``"dense"``: with every key, as the eager path computes it and
            most counters count it.
        window: Most keys that a query sees, itself included. It is applied to stored tokens; where
            tokens between were dropped but kept their positions, the real number is smaller.

    Raises:
        ConfigError: ``causal`` is neither.
    """
    if causal == "dense":
        return tokens * (cached + tokens)
    if causal != "ideal":
        raise ConfigError(
            f"causal must be 'ideal' or 'dense', got {causal!r}."
            f"{did_you_mean(causal, ('ideal', 'dense'))}"
        )
    # Query i of 1..n sees cached + i keys, until the window is full.
    growing = tokens if window is None else max(0, min(tokens, window - cached))
    full = 0 if window is None else (tokens - growing) * window
    return growing * cached + growing * (growing + 1) // 2 + full


def _decoder_layer(
    layer: DecoderLayer, tokens: int, cached: int, *, causal: Causal = "ideal"
) -> int:
    """Multiply-adds of one call of one decoder layer."""
    pairs = visible_pairs(tokens, cached, causal=causal, window=layer.window)
    keys = cached + tokens if tokens else 0
    return tokens * layer.token + pairs * layer.pair + keys * layer.key


def prefill_macs(
    shape: DecoderShape | Decoder,
    tokens_per_layer: int | Iterable[int],
    *,
    causal: Causal = "ideal",
    cached: int | Iterable[int] = 0,
) -> int:
    """Multiply-adds of the decoder layers in one prefill of one sample, without the head.

    Args:
        shape: The decoder.
        tokens_per_layer: Tokens, text and visual, that enter each layer.
        causal: See :func:`visible_pairs`.
        cached: Tokens that each layer's cache already held (an earlier turn).

    Raises:
        ConfigError: A negative or fractional count, another number of layers, unknown ``causal``.
    """
    tokens = per_layer("tokens_per_layer", tokens_per_layer, shape.num_layers)
    before = per_layer("cached", cached, shape.num_layers)
    return sum(
        _decoder_layer(layer, n, c, causal=causal)
        for layer, n, c in zip(shape.layers, tokens, before, strict=True)
    )


def decode_macs(
    shape: DecoderShape | Decoder, stored_per_layer: int | Iterable[int], steps: int = 1
) -> int:
    """Multiply-adds of the decoder layers in ``steps`` single-token steps, without the head.

    Args:
        shape: The decoder.
        stored_per_layer: Tokens in each layer's cache before the first step; each step adds one.
        steps: Forward calls of one token. Generating N tokens takes N − 1: the prefill gives one.

    Raises:
        ConfigError: A negative or fractional count, or another number of layers.
    """
    stored = per_layer("stored_per_layer", stored_per_layer, shape.num_layers)
    steps = as_count("steps", steps)
    # The pairs of all steps are those of one call of so many tokens; keys are read in every step.
    return sum(
        steps * layer.token
        + visible_pairs(steps, kept, window=layer.window) * layer.pair
        + (steps * kept + steps * (steps + 1) // 2) * layer.key
        for layer, kept in zip(shape.layers, stored, strict=True)
    )


def lm_head_macs(shape: DecoderShape | Decoder, rows: int) -> int:
    """Multiply-adds of the language-model head on ``rows`` tokens.

    ``generate`` applies it to one row per call, a plain forward to every token that is left.

    Raises:
        ConfigError: ``rows`` is negative or not whole.
    """
    return as_count("rows", rows) * shape.head


def _window_pairs(height: int, width: int, side: int) -> int:
    """Count (query, key) pairs within the windows of one frame; those at the border are smaller."""
    rows, cols = (
        (size // side) * side**2 + (size % side) ** 2  # sum over windows of the side, squared
        for size in (height, width)
    )
    return rows * cols


def _grid(grid: Sequence[int]) -> tuple[int, int, int]:
    """Return a checked ``(t, h, w)``."""
    sizes = [as_count("A size of a grid", size, minimum=1) for size in grid]
    if len(sizes) != 3:
        raise ConfigError(f"A grid is (frames, rows, columns) in patches, got {sizes}.")
    return sizes[0], sizes[1], sizes[2]


def vision_macs(
    shape: VisionShape | Encoder,
    grids: Iterable[Sequence[int]],
    counts: Sequence[tuple[int, int]] | None = None,
    leaving: int | None = None,
) -> int:
    """Multiply-adds of the image encoder, patch embedding included.

    Args:
        shape: The encoder.
        grids: ``(t, h, w)`` in patches for each picture, crop or clip: ``[(1, 24, 24)] * 5`` for
            five CLIP crops, the rows of ``image_grid_thw`` for Qwen. A frame attends to itself.
        counts: Of each layer, the patches that enter it and those that are left behind its
            attention, where a method takes some inside; every frame has as many. ``None``: all.
        leaving: Patches of each frame that leave the last layer, where some come back; ``None``:
            those of ``counts``.

    Raises:
        ConfigError: A grid is not three positive whole numbers, or ``counts`` has another number of
            layers, or there are windows (who shares one would depend on positions).
    """
    layers = shape.layers
    if counts is not None:
        if any(layer.window is not None for layer in layers):
            raise ConfigError("Layers with windows are counted for whole frames only.")
        entering = per_layer("counts", (before for before, _ in counts), len(layers))
        left = per_layer("counts", (after for _, after in counts), len(layers))
    macs = 0
    for t, h, w in map(_grid, grids):
        patches = h * w
        if counts is None:
            entering = left = [patches] * len(layers)
        macs += t * patches * shape.patch
        macs += t * _frame_macs(shape, (h, w), entering, left, leaving)
    return macs


def packed_macs(
    shape: VisionShape | Encoder, frames: Sequence[int], windows: Sequence[int] = ()
) -> int:
    """Multiply-adds of an image encoder that is given a part of the patches of its pictures.

    Args:
        shape: The encoder.
        frames: Patches of each frame that are there.
        windows: Patches of each window, of an encoder some of whose layers attend within windows.

    Raises:
        ConfigError: Windows and frames hold different numbers of patches.
    """
    patches = sum(as_count("frames", count) for count in frames)
    if any(layer.window is not None for layer in shape.layers) and sum(windows) != patches:
        raise ConfigError(
            f"The windows hold {sum(windows)} patches, the frames {patches}; each patch is in one."
        )
    macs = patches * shape.patch
    for layer in shape.layers:
        parts = frames if layer.window is None else windows
        macs += layer.macs(patches, sum(count * count for count in parts), patches)
    return macs


def _frame_macs(
    shape: VisionShape | Encoder,
    grid: tuple[int, int],
    entering: list[int],
    left: list[int],
    leaving: int | None,
) -> int:
    """Multiply-adds of one frame behind the embedding."""
    macs, tokens = shape.pooled, grid[0] * grid[1] + shape.prefix
    for layer, before, after in zip(shape.layers, entering, left, strict=True):
        queries, tokens = before + shape.prefix, after + shape.prefix
        pairs = queries * queries if layer.window is None else _window_pairs(*grid, layer.window)
        macs += layer.macs(queries, pairs, tokens)
    pooled = tokens if leaving is None else leaving + shape.prefix
    return macs + pooled * shape.pooled_token


def encoder_macs(
    shape: VisionShape | Encoder,
    tokens_per_layer: int | Iterable[int],
    mlp_tokens_per_layer: int | Iterable[int] | None = None,
    *,
    patches: int = 0,
) -> int:
    """Multiply-adds of an image encoder that loses tokens on the way (one picture, no windows).

    Args:
        shape: The tower. Windows are refused: who shares one would depend on positions.
        tokens_per_layer: Tokens, CLS included, that enter each layer's attention.
        mlp_tokens_per_layer: Tokens that enter each layer's MLP, where a method drops or merges
            tokens between the two (ToMe, EViT); ``None``: the same.
        patches: Patches that were embedded; 0 leaves the patch embedding out.

    Raises:
        ConfigError: A negative or fractional count, another number of layers, or a tower with
            windowed layers.
    """
    if any(layer.window is not None for layer in shape.layers):
        raise ConfigError("encoder_macs counts global attention only; use vision_macs for windows.")
    tokens = per_layer("tokens_per_layer", tokens_per_layer, shape.num_layers)
    mlp = tokens
    if mlp_tokens_per_layer is not None:
        mlp = per_layer("mlp_tokens_per_layer", mlp_tokens_per_layer, shape.num_layers)
    embedding = as_count("patches", patches) * shape.patch
    return embedding + sum(
        layer.macs(n, n * n, k) for layer, n, k in zip(shape.layers, tokens, mlp, strict=True)
    )


def projected_tokens(shape: ProjectorShape | Projector, grids: Iterable[Sequence[int]]) -> int:
    """Count the tokens that come out of the projector for whole, unpruned pictures.

    Args:
        shape: The projector.
        grids: As in :func:`vision_macs`.

    Raises:
        ConfigError: A grid is not three positive whole numbers, or cannot be cut into blocks.
    """
    tokens = 0
    for t, h, w in map(_grid, grids):
        if h % shape.merge or w % shape.merge:
            raise ConfigError(
                f"A grid of {h} by {w} patches cannot be cut into blocks of {shape.merge} by "
                f"{shape.merge}; both sides must be multiples of {shape.merge}."
            )
        tokens += t * (h * w // shape.merge**2 + shape.keeps_cls)
    return tokens


def projector_macs(
    shape: ProjectorShape | Projector, tokens: int, grids: Iterable[Sequence[int]] = ()
) -> int:
    """Multiply-adds of the projector for ``tokens`` tokens that come out of it.

    Args:
        shape: The projector.
        tokens: Those that are of patches.
        grids: As in :func:`vision_macs`, for what is done once a row.

    Raises:
        ConfigError: ``tokens`` is negative or not whole, or a grid is not three such numbers.
    """
    row = shape.row if isinstance(shape, Projector) else 0
    rows = sum(t * (h // shape.merge) for t, h, _ in map(_grid, grids)) if row else 0
    return as_count("tokens", tokens) * shape.macs_per_token + rows * row


def kv_bytes(
    shape: DecoderShape | Decoder, stored_per_layer: int | Iterable[int], dtype: torch.dtype | int
) -> int:
    """Bytes of the cache of one sample: keys and values, latents, states of recurrent layers.

    Args:
        shape: The decoder.
        stored_per_layer: Tokens physically stored in each layer's cache.
        dtype: The cache's dtype, or the bytes of one element.

    Raises:
        ConfigError: A negative or fractional count, or another number of layers.
    """
    stored = per_layer("stored_per_layer", stored_per_layer, shape.num_layers)
    itemsize = as_count("The bytes of one element", getattr(dtype, "itemsize", dtype), minimum=1)
    numbers = sum(
        count * layer.cache + layer.state for layer, count in zip(shape.layers, stored, strict=True)
    )
    return numbers * itemsize


def mean_tokens(tokens_per_layer: Sequence[int]) -> float:
    """Return the mean over layers, which tables call "average" or "equivalent" tokens.

    FastV that drops 576 tokens to 144 at layer 2 of 32 has 171, not 144.

    Raises:
        ConfigError: There is no layer, or a count is negative or not whole.
    """
    counts = [as_count("tokens_per_layer", count) for count in tokens_per_layer]
    if not counts:
        raise ConfigError("tokens_per_layer is empty; give one count per layer.")
    return sum(counts) / len(counts)
