# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds (MACs) of each part of a vision-language model.

Of one decoder layer with n tokens, width d, query width q, key width k and MLP width m:
``n·d·(q + 2k) + n·q·d`` for the projections, ``2·q`` for each pair of a query and a key it sees,
and ``3·n·d·m`` for the MLP (``2·n·d·m`` where it has no gate). :mod:`visprune.cost.cost` says
what is counted and what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from visprune.cost.shapes import DecoderShape, ProjectorShape, VisionShape, as_count
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


def _decoder_layer(shape: DecoderShape, tokens: int, pairs: int) -> int:
    """Multiply-adds of one decoder layer."""
    width, query, kv = shape.hidden_size, shape.query_size, shape.kv_size
    projections = tokens * width * (2 * query + 2 * kv)
    mlp = (3 if shape.gated_mlp else 2) * tokens * width * shape.ffn_size
    return projections + 2 * query * pairs + mlp


def prefill_macs(
    shape: DecoderShape,
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
        _decoder_layer(shape, n, visible_pairs(n, c, causal=causal, window=shape.window(layer)))
        for layer, (n, c) in enumerate(zip(tokens, before, strict=True))
    )


def decode_macs(shape: DecoderShape, stored_per_layer: int | Iterable[int], steps: int = 1) -> int:
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
    return sum(
        _decoder_layer(shape, steps, visible_pairs(steps, kept, window=shape.window(layer)))
        for layer, kept in enumerate(stored)
    )


def lm_head_macs(shape: DecoderShape, rows: int) -> int:
    """Multiply-adds of the language-model head on ``rows`` tokens.

    ``generate`` applies it to one row per call, a plain forward to every token that is left.

    Raises:
        ConfigError: ``rows`` is negative or not whole.
    """
    return as_count("rows", rows) * shape.hidden_size * shape.vocab_size


def _encoder_layer(shape: VisionShape, tokens: int, pairs: int, mlp_tokens: int) -> int:
    """Multiply-adds of one vision layer."""
    width, heads = shape.hidden_size, shape.attention_size
    mlp = (3 if shape.gated_mlp else 2) * mlp_tokens * width * shape.ffn_size
    return 4 * tokens * width * heads + 2 * heads * pairs + mlp


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


def vision_macs(shape: VisionShape, grids: Iterable[Sequence[int]]) -> int:
    """Multiply-adds of the vision tower, patch embedding included.

    Args:
        shape: The tower.
        grids: ``(t, h, w)`` in patches for each picture, crop or clip: ``[(1, 24, 24)] * 5`` for
            five CLIP crops, the rows of ``image_grid_thw`` for Qwen. A frame attends to itself.

    Raises:
        ConfigError: A grid is not three positive whole numbers.
    """
    windowed = len(set(shape.windowed_layers))
    macs = 0
    for t, h, w in map(_grid, grids):
        tokens = h * w + shape.has_cls
        frame = h * w * shape.patch_dim * shape.hidden_size
        frame += (shape.num_layers - windowed) * _encoder_layer(shape, tokens, tokens**2, tokens)
        if shape.window is not None:
            pairs = _window_pairs(h, w, shape.window)
            frame += windowed * _encoder_layer(shape, tokens, pairs, tokens)
        macs += t * frame
    return macs


def projected_tokens(shape: ProjectorShape, grids: Iterable[Sequence[int]]) -> int:
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


def projector_macs(shape: ProjectorShape, tokens: int) -> int:
    """Multiply-adds of the projector for ``tokens`` tokens that come out of it.

    Raises:
        ConfigError: ``tokens`` is negative or not whole.
    """
    return as_count("tokens", tokens) * shape.macs_per_token


def kv_bytes(
    shape: DecoderShape, stored_per_layer: int | Iterable[int], dtype: torch.dtype | int
) -> int:
    """Bytes of the keys and values in the cache of one sample.

    Args:
        shape: The decoder.
        stored_per_layer: Tokens physically stored in each layer's cache.
        dtype: The cache's dtype, or the bytes of one element.

    Raises:
        ConfigError: A negative or fractional count, or another number of layers.
    """
    stored = per_layer("stored_per_layer", stored_per_layer, shape.num_layers)
    itemsize = as_count("The bytes of one element", getattr(dtype, "itemsize", dtype), minimum=1)
    return 2 * sum(stored) * shape.kv_size * itemsize


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
