# SPDX-License-Identifier: Apache-2.0
"""What a run costs, counted from the tokens that really entered each layer.

The unit is the multiply-add (MAC); ``flops = 2 × macs``. Papers of this field call either of them
"FLOPs": :mod:`visprune.cost.presets` reproduces what they print.

Counted: every matrix product and the patch convolution, with grouped-query attention and gated MLPs
as they are, causal attention as a kernel computes it that skips what is masked (``causal="ideal"``)
or as the full square (``"dense"``); of experts, those that a token is sent to; of a recurrent
layer, three products with its state for each token, though kernels that work in chunks spend more.

Not counted: norms, activations, softmax, rotary embeddings, residual additions, biases, embedding
look-ups, sampling; nor the padding of a batch, which belongs to no sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visprune.cost.layers import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Projector,
    as_count,
)
from visprune.cost.macs import (
    Causal,
    decode_macs,
    encoder_macs,
    kv_bytes,
    lm_head_macs,
    mean_tokens,
    packed_macs,
    per_layer,
    prefill_macs,
    projected_tokens,
    projector_macs,
    visible_pairs,
    vision_macs,
)
from visprune.cost.shapes import DecoderShape, ModelShape, ProjectorShape, VisionShape
from visprune.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "PARTS",
    "Causal",
    "Cost",
    "Decoder",
    "DecoderLayer",
    "DecoderShape",
    "Encoder",
    "EncoderLayer",
    "ModelShape",
    "Projector",
    "ProjectorShape",
    "VisionShape",
    "decode_macs",
    "encoder_macs",
    "kv_bytes",
    "lm_head_macs",
    "mean_tokens",
    "packed_macs",
    "prefill_macs",
    "projected_tokens",
    "projector_macs",
    "sample_cost",
    "visible_pairs",
    "vision_macs",
]

PARTS = ("vision", "projector", "selection", "prefill", "lm_head", "decode")


@dataclass(frozen=True)
class Cost:
    """Multiply-adds by part, and cache bytes, of one sample or of several together.

    ``a + b`` is the cost of both samples; ``sum(costs)`` works too.

    Args:
        vision: The vision tower.
        projector: The layers between tower and decoder.
        selection: What the method itself computes to choose or merge tokens.
        prefill: Decoder layers over the prompt.
        lm_head: The language-model head, in prefill and decode.
        decode: Decoder layers over the generated tokens.
        kv_bytes: Bytes of keys and values in the cache after the prefill.
        samples: How many samples are in it.

    Raises:
        ConfigError: A number is negative or not whole.
    """

    vision: int = 0
    projector: int = 0
    selection: int = 0
    prefill: int = 0
    lm_head: int = 0
    decode: int = 0
    kv_bytes: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        for name in (*PARTS, "kv_bytes", "samples"):
            # As a plain int, so that a record of a NumPy or tensor count can be written as JSON.
            object.__setattr__(self, name, as_count(f"Cost.{name}", getattr(self, name)))

    @property
    def parts(self) -> dict[str, int]:
        """Multiply-adds of each part, in the order of a forward pass."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def macs(self) -> int:
        """Multiply-adds of all parts."""
        return sum(self.parts.values())

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.macs

    def __add__(self, other: object) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        names = (*PARTS, "kv_bytes", "samples")
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __radd__(self, other: object) -> Cost:
        # sum() starts at 0.
        if type(other) is int and other == 0:
            return self
        return NotImplemented

    def per_sample(self) -> dict[str, float]:
        """Return the mean over samples: each part, ``macs``, ``flops`` and ``kv_bytes``.

        Raises:
            ConfigError: There are no samples in it.
        """
        if not self.samples:
            raise ConfigError("This cost holds no samples, so it has no mean.")
        totals = {**self.parts, "macs": self.macs, "flops": self.flops, "kv_bytes": self.kv_bytes}
        return {name: value / self.samples for name, value in totals.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON; flops of a part are twice its macs."""
        return {
            "samples": self.samples,
            "macs": self.macs,
            "flops": self.flops,
            "parts": self.parts,
            "kv_bytes": self.kv_bytes,
        }

    def table(self) -> str:
        """Return the mean per sample as aligned text, one line per part."""
        mean = self.per_sample()
        lines = [f"{'part':<10}{'GMACs':>14}{'GFLOPs':>14}{'share':>9}"]
        for name in (*PARTS, "macs"):
            share = mean[name] / mean["macs"] if mean["macs"] else 0.0
            label = "total" if name == "macs" else name
            giga = mean[name] / 1e9
            lines.append(f"{label:<10}{giga:>14.4f}{2 * giga:>14.4f}{share:>9.1%}")
        samples = f", mean of {self.samples} samples" if self.samples > 1 else ""
        lines.append(f"KV cache after prefill: {mean['kv_bytes'] / 2**20:.3f} MiB{samples}")
        return "\n".join(lines)


def sample_cost(
    model: ModelShape,
    *,
    tokens_per_layer: int | Iterable[int],
    dtype: torch.dtype | int,
    grids: Iterable[Sequence[int]] = (),
    encoder_counts: Sequence[tuple[int, int]] | None = None,
    vision: int | None = None,
    projected: int | None = None,
    stored_per_layer: int | Iterable[int] | None = None,
    cached: int | Iterable[int] = 0,
    head_rows: int = 1,
    decode_steps: int = 0,
    selection: int = 0,
    causal: Causal = "ideal",
) -> Cost:
    """Price one sample: a prefill and, after it, any number of single-token steps.

    Args:
        model: What the call runs through.
        tokens_per_layer: Tokens, text and visual, that enter each decoder layer.
        dtype: The cache's dtype, or the bytes of one element.
        grids: ``(t, h, w)`` in patches of everything the vision tower encodes in this call.
        encoder_counts: Patches of a frame before and behind each encoder layer's attention, where
            a method takes some inside the encoder; ``None``: all.
        vision: Multiply-adds of the encoder; ``None``: those of ``grids`` and ``encoder_counts``.
        projected: Tokens out of the projector; ``None``: those of the whole ``grids``.
        stored_per_layer: Tokens in each layer's cache after the prefill; ``None``: ``cached`` and
            the tokens that entered. Less where a method evicts (site ``cache``).
        cached: Tokens in each layer's cache before (an earlier turn).
        head_rows: Rows that the language-model head is applied to in the prefill: 1 in
            ``generate``, all tokens that are left in a plain forward.
        decode_steps: Single-token forward calls. Generating N tokens takes N − 1.
        selection: Multiply-adds of the method itself.
        causal: ``"ideal"`` or ``"dense"``, see :func:`visible_pairs`.

    Raises:
        ConfigError: A negative or fractional count, another number of layers, a grid that is none.
    """
    decoder, pictures = model.decoder, [tuple(grid) for grid in grids]
    tokens = per_layer("tokens_per_layer", tokens_per_layer, decoder.num_layers)
    before = per_layer("cached", cached, decoder.num_layers)
    stored = [old + new for old, new in zip(before, tokens, strict=True)]
    if stored_per_layer is not None:
        stored = per_layer("stored_per_layer", stored_per_layer, decoder.num_layers)
    if projected is None:
        projected = projected_tokens(model.projector, pictures)
    if vision is None:
        vision = vision_macs(model.vision, pictures, encoder_counts)
    steps, rows = as_count("decode_steps", decode_steps), as_count("head_rows", head_rows)
    queries = [
        min(n, rows) if layer.last_rows else n
        for n, layer in zip(tokens, decoder.layers, strict=True)
    ]
    seen = [old + n - q for old, n, q in zip(before, tokens, queries, strict=True)]
    return Cost(
        vision=vision,
        projector=projector_macs(model.projector, projected, pictures),
        selection=selection,
        prefill=prefill_macs(decoder, queries, causal=causal, cached=seen),
        lm_head=lm_head_macs(decoder, rows + steps),
        decode=decode_macs(decoder, stored, steps),
        kv_bytes=kv_bytes(decoder, stored, dtype),
    )
