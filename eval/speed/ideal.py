# SPDX-License-Identifier: Apache-2.0
"""The ideal that a pruning library is measured against: the model itself, fed the short sequence.

No line of the pruning machinery runs in it: transformers' own modules and slicing alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from visprune.backbones.hf.cache import CACHE_ARGUMENT
from visprune.core.selection import Selection
from visprune.core.trace import Trace
from visprune.errors import ConfigError, did_you_mean

__all__ = ["SHAPES", "Ideal", "Shape", "build", "ideal_of", "prompt"]

_IMAGE = 3  # placeholder id


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA to be measured; the weights are random, the time is not.

    Attributes:
        image: side of the picture, pixels.
        patch: side of a patch, pixels.
        vision: width, layers, heads and FFN width of the CLIP tower.
        text: the same of the Llama decoder.
        vocabulary: tokens.
        text_tokens: text tokens of the prompt, before and after the picture.
        fastv_layer: where FastV drops.
        key_heads: of the decoder, where queries share them.
    """

    image: int
    patch: int
    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    vocabulary: int
    text_tokens: int = 40
    fastv_layer: int = 2
    key_heads: int | None = None

    @property
    def visual_tokens(self) -> int:
        """Patches of the picture."""
        return (self.image // self.patch) ** 2


SHAPES = {
    "small": Shape(336, 14, (256, 6, 4, 1024), (1024, 12, 16, 2752), 32000),
    "wide": Shape(756, 14, (256, 6, 4, 1024), (1024, 12, 16, 2752), 32000),
    "grouped": Shape(756, 14, (256, 2, 4, 1024), (2048, 4, 32, 5632), 32000, key_heads=8),
    "7b": Shape(336, 14, (1024, 24, 16, 4096), (4096, 32, 32, 11008), 32064),
    "quick": Shape(96, 8, (32, 3, 2, 64), (64, 8, 4, 128), 200),
}


def build(
    shape: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """Build a LLaVA of random weights.

    Raises:
        ConfigError: unknown shape.
    """
    if shape not in SHAPES:
        raise ConfigError(
            f"Unknown shape {shape!r}.{did_you_mean(shape, SHAPES)} Known: {', '.join(SHAPES)}."
        )
    sizes = SHAPES[shape]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = CLIPVisionConfig(
        **dict(zip(names, sizes.vision, strict=True)),
        image_size=sizes.image,
        patch_size=sizes.patch,
    )
    text = LlamaConfig(
        **dict(zip(names, sizes.text, strict=True)), vocab_size=sizes.vocabulary,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        num_key_value_heads=sizes.key_heads,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=_IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=sizes.visual_tokens,
    )  # fmt: skip
    torch.manual_seed(seed)
    # Created where and as it is used: a 7B model in float32 on the CPU first would be 28 GB.
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def prompt(model: Any, shape: str, batch: int = 1, seed: int = 1) -> dict[str, Tensor]:
    """A prompt of random text around one random picture, the same length in every row."""
    sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, sizes.vocabulary, (batch, sizes.text_tokens), generator=generator)
    before = min(5, sizes.text_tokens - 1)
    placeholders = torch.full((batch, sizes.visual_tokens), _IMAGE)
    ids = torch.cat([ids[:, :before], placeholders, ids[:, before:]], dim=1)
    pixels = torch.randn(batch, 3, sizes.image, sizes.image, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


@dataclass
class Ideal:
    """A prefill that is fed the short sequence from the start.

    Args:
        model: an untouched LLaVA.
        inputs: of :func:`prompt`.
        embeds: the short sequence, ``[B, P, D]``, made beforehand.
        positions: its position ids, ``[B, P]``.
        drops: by decoder layer, which places of the sequence so far go on from there, ``[B, P']``.
    """

    model: Any
    inputs: dict[str, Tensor]
    embeds: Tensor
    positions: Tensor
    drops: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, turn: int = 0) -> Tensor:
        """Encode the picture (its features are the ones in ``embeds``), run the decoder.

        Returns:
            Logits after the last token, ``[B, vocabulary]``.
        """
        core = self.model.model
        core.get_image_features(pixel_values=self.inputs["pixel_values"], return_dict=True)
        hidden = self._layers() if self.drops else self._plain()
        return self.model.lm_head(hidden[:, -1])

    def _plain(self) -> Tensor:
        return self.model.model.language_model(
            inputs_embeds=self.embeds,
            # Explicit, since gaps in the ids would be taken for packed sequences.
            attention_mask=torch.ones(self.embeds.shape[:2], device=self.embeds.device),
            position_ids=self.positions,
            use_cache=True,
        ).last_hidden_state

    def _layers(self) -> Tensor:
        """The decoder layer by layer, shorter from some layers on."""
        decoder = self.model.model.language_model
        hidden, cache = self.embeds, DynamicCache(config=decoder.config)
        rotary = decoder.rotary_emb(hidden, position_ids=self.positions)
        for number, layer in enumerate(decoder.layers):
            if number in self.drops:
                index = self.drops[number]
                hidden, *rest = (
                    part.expand(len(index), -1, -1).gather(
                        1, index[..., None].expand(-1, -1, part.shape[-1])
                    )
                    for part in (hidden, *rotary)
                )
                rotary = tuple(rest)
            # No mask: SDPA's own causal path.
            out = layer(
                hidden, attention_mask=None, position_embeddings=rotary, use_cache=True,
                **{CACHE_ARGUMENT: cache},
            )  # fmt: skip
            hidden = out if isinstance(out, Tensor) else out[0]
        return decoder.norm(hidden)


@torch.inference_mode()
def ideal_of(
    model: Any, inputs: dict[str, Tensor], trace: Trace, selection: Selection | None = None
) -> Ideal:
    """Build the ideal of what a method just did on ``inputs``, from the tokens it kept.

    Args:
        model: the model, untouched again.
        inputs: of :func:`prompt`: one picture per row, at the same place in each.
        trace: of the method's prefill.
        selection: what it selected there; ``None``: what the trace says.

    Raises:
        ConfigError: rows disagree on a withdrawal, so that no one sequence is the short one.
    """
    per_layer = trace.tokens_per_layer[0]
    if any(row != per_layer for row in trace.tokens_per_layer):
        raise ConfigError("Rows of this batch keep different numbers of tokens; bench them alone.")
    selection = _together(trace) if selection is None else selection
    ids, total = inputs["input_ids"], selection.num_tokens
    start = int((ids[0] == _IMAGE).nonzero()[0])
    text = model.get_input_embeddings()(ids)  # [B, S, D]
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    visual = torch.stack(list(features.pooler_output)).to(text.dtype)  # [B, N, D]
    places = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    whole = torch.cat([text[:, :start], visual, text[:, start + total :]], dim=1)
    short = [places[:, :start], start + selection.index, places[:, start + total :]]
    if per_layer[0] == total and selection.num_slots < total:
        ideal = Ideal(model, inputs, whole, places)
        layer = next(n for n, count in enumerate(per_layer) if count < total)
        ideal.drops[layer] = torch.cat(short, dim=1)
    else:
        slots = selection.reduce(visual)
        embeds = torch.cat([text[:, :start], slots, text[:, start + total :]], dim=1)
        positions = torch.cat(short, dim=1)
        if trace.positions == "compact":
            positions = places[:, : embeds.shape[1]]
        ideal = Ideal(model, inputs, embeds, positions)
    if 0 in per_layer:
        last = per_layer[per_layer.index(0) - 1]
        alive = torch.arange(ids.shape[1] - total + last, device=ids.device)
        left = torch.cat([alive[:start], alive[start + last :]])
        ideal.drops[per_layer.index(0)] = left.expand(len(ids), -1)
    return ideal


def _together(trace: Trace) -> Selection:
    """The selections of all pictures, which keep equally many tokens, as one."""
    rows = [trace.whole(image) for image in range(len(trace.kept))]
    if any(row is None for row in rows):
        raise ConfigError("Nothing was selected: there is no ideal to compare with.")

    def column(name: str) -> Tensor | None:
        parts = [getattr(row, name) for row in rows]
        return None if parts[0] is None else torch.cat(parts)

    first = rows[0]
    assert first is not None, "looked at above"
    index = torch.cat([row.index for row in rows if row is not None])
    return Selection(
        index, first.num_tokens, column("own"), column("source"), column("slot"),
        column("weight"), gaps=first.gaps, overlaps=first.overlaps,
    )  # fmt: skip
