# SPDX-License-Identifier: Apache-2.0
"""What papers print as "FLOPs", to the digit: for comparing with them, never for our own reports.

All of them leave out the vision tower, the projector, the selection and the decoding. LLaVA-1.5-7B
unpruned is 3.2 T by :func:`fastv`, 3.8 T by :func:`pyramiddrop` and 8.5 T by :func:`calflops`; they
also differ in which tokens they count (see each).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from visprune.cost.layers import as_count
from visprune.cost.macs import lm_head_macs, per_layer, prefill_macs
from visprune.cost.shapes import DecoderShape
from visprune.errors import ConfigError, did_you_mean

__all__ = ["LLAVA_1_5_7B", "CalflopsCount", "calflops", "fastv", "pyramiddrop"]

# The decoder that nearly every published number is about: Vicuna-7B.
LLAVA_1_5_7B = DecoderShape(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_size=11008,
    vocab_size=32000,
)


def _square(tokens_per_layer: Iterable[int], width: int, inner: int, matrices: int) -> int:
    """Sum ``4nd² + 2n²d + matrices·ndm`` over layers: multi-head attention, the full square."""
    counts = [as_count("tokens_per_layer", count) for count in tokens_per_layer]
    width, inner = (as_count("A width", size, minimum=1) for size in (width, inner))
    return sum(4 * n * width**2 + 2 * n**2 * width + matrices * n * width * inner for n in counts)


def fastv(
    tokens_per_layer: Iterable[int], *, hidden_size: int = 4096, ffn_size: int = 11008
) -> int:
    """Multiply-adds by equation 5 of FastV (arXiv 2403.06764): ``4nd² + 2n²d + 2ndm`` per layer.

    The paper calls them FLOPs; DivPrune, VisionZip and ToDRE print the same. The MLP has two
    matrices here, LLaMA's has three. FastV's "99.3 B" is one layer at n = 612 (36 system and 576
    image tokens): ``fastv([612])``.

    Args:
        tokens_per_layer: Tokens in each layer; as many layers as are counted.
        hidden_size: d, by default that of LLaVA-1.5-7B.
        ffn_size: m, likewise.

    Raises:
        ConfigError: A negative or fractional count.
    """
    return _square(tokens_per_layer, hidden_size, ffn_size, 2)


def pyramiddrop(
    tokens_per_layer: Iterable[int], *, hidden_size: int = 4096, ffn_size: int = 11008
) -> int:
    """Multiply-adds as in PyramidDrop (arXiv 2410.17247): ``4nd² + 2n²d + 3ndm`` per layer.

    SparseVLM (arXiv 2410.04417) and VoCo-LLaMA count the same way. PyramidDrop's "3.82 T" counts
    image tokens only: ``pyramiddrop([576] * 32)``. Right for LLaMA's MLP, too high where key and
    value heads are shared.

    Args:
        tokens_per_layer: Tokens in each layer; as many layers as are counted.
        hidden_size: d, by default that of LLaVA-1.5-7B.
        ffn_size: m, likewise.

    Raises:
        ConfigError: A negative or fractional count.
    """
    return _square(tokens_per_layer, hidden_size, ffn_size, 3)


@dataclass(frozen=True)
class CalflopsCount:
    """The two numbers that the calflops tool prints for one forward call."""

    flops: int
    macs: int


def calflops(
    shape: DecoderShape,
    tokens_per_layer: int | Iterable[int],
    *,
    head_rows: int | None = None,
    attention: Literal["eager", "sdpa"] = "eager",
) -> CalflopsCount:
    """Return what calflops 0.3 prints for a LLaMA-like decoder with its head.

    It adds to ``2 × macs`` one operation for each element of the MLP's activation and of the
    softmax, and counts attention as the full square. It does not see the operators ``*``, ``+`` and
    ``@``, so norms and rotary embeddings are missing; nor does it see ``sdpa``, so that attention
    is missing altogether there.

    VTW (arXiv 2405.05803) prints 8.48 T for LLaVA-1.5-7B and no prompt length; 626 tokens give it.

    Args:
        shape: The decoder.
        tokens_per_layer: Tokens that enter each layer; one number stands for every layer.
        head_rows: Rows of the head; ``None``: as many as tokens enter the last layer.
        attention: What the counted model ran with.

    Raises:
        ConfigError: A bad count, another number of layers, or unknown ``attention``.
    """
    if attention not in ("eager", "sdpa"):
        raise ConfigError(
            f"attention must be 'eager' or 'sdpa', got {attention!r}."
            f"{did_you_mean(attention, ('eager', 'sdpa'))}"
        )
    tokens = per_layer("tokens_per_layer", tokens_per_layer, shape.num_layers)
    macs = prefill_macs(shape, tokens, causal="dense")
    macs += lm_head_macs(shape, tokens[-1] if head_rows is None else head_rows)
    squares = sum(n * n for n in tokens)
    elements = shape.ffn_size * sum(tokens)
    if attention == "eager":
        elements += shape.num_heads * squares
    else:
        macs -= 2 * shape.query_size * squares
    return CalflopsCount(flops=2 * macs + elements, macs=macs)
