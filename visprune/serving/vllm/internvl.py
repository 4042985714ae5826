# SPDX-License-Identifier: Apache-2.0
"""InternVL in vLLM, as transformers writes it. Each token is a block of patches of one tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import interns1
from vllm.multimodal import MULTIMODAL_REGISTRY

from visprune.core.signals import EncoderSignal, Fingerprint
from visprune.core.signals.base import EncoderSeen
from visprune.serving.asked import Asked
from visprune.serving.places import blocks, shown_layers, spec_of, tiles
from visprune.serving.shorten import Encoded, shorten
from visprune.serving.vllm.processor import (
    Prunes,
    Refuses,
    check_graphs,
    encoded_together,
    parts,
    taken,
)


class InternVLProcessor(Prunes, interns1.InternS1MultiModalProcessor):
    """Tiles and the whole picture."""

    apart = (
        "Words stand between the frames of its clips, and how many tokens of each frame stay is "
        "not known before they are encoded. "
    )

    @property
    def shows(self) -> frozenset[str]:
        """Layers of the encoder."""
        return shown_layers(self.info.get_hf_config())

    def places(self, kind: str, number: int, items: Any, out: Any) -> tuple[Tensor, int]:
        """Those of as many tiles as the image processor made."""
        count = int(out[kind][number]["image_num_patches"].data)
        return tiles(self.info.get_hf_config(), count), 0


class InternS1Processor(Refuses, interns1.InternS1MultiModalProcessor):
    """Intern-S1, which the same class of vLLM serves."""

    reason = "it was tried with InternVL alone"


def _processor(info: Any, dummy_inputs: Any, **more: Any) -> Any:
    known = info.get_hf_config().model_type == "internvl"
    return (InternVLProcessor if known else InternS1Processor)(info, dummy_inputs, **more)


@MULTIMODAL_REGISTRY.register_processor(
    _processor,
    info=interns1.InternS1ProcessingInfo,
    dummy_inputs=interns1.InternS1DummyInputsBuilder,
)
class InternVL(interns1.InternS1ForConditionalGeneration):
    """vLLM's InternVL."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_graphs(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.together = encoded_together(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode pictures, and prune them."""
        asked = taken(kwargs, "image")
        if asked is None:
            return super().embed_multimodal(**kwargs)
        counts = [int(n) for n in kwargs["image_num_patches"]]
        sizes = [len(tiles(self.config, count)) for count in counts]
        flat = {"pixel_values": counts}
        return [one for own, part in parts(kwargs, sizes, self.together, flat)
                for one in self._pruned(asked[own], part, counts[own])]  # fmt: skip

    def _pruned(
        self, asked: list[Asked], kwargs: dict[str, Any], counts: list[int]
    ) -> list[Tensor]:
        spec = spec_of(self.config)
        with self._reading(asked, spec) as heard:
            whole = super().embed_multimodal(**kwargs)
        left, first = [], 0
        for one, rows, count in zip(asked, whole, counts, strict=True):
            own = slice(first, first + count)
            first += count
            signals: dict[Any, Any] = {
                signal: _blocks_of(value[own].movedim(signal.token_dim, 1), self.config)
                for signal, value in heard.items()
            }
            shown = Fingerprint()  # tile by tile, as a model that encodes them one by one
            parts = [shown.read(tile) for tile in kwargs["pixel_values"][own]]
            signals[shown] = shown.joined(parts) if count > 1 else parts[0]
            picture = Encoded(rows, tiles(self.config, count), signals=signals)
            left.append(shorten(one, picture, spec)[0])
        return left

    @contextmanager
    def _reading(self, asked: list[Asked], spec: Any) -> Iterator[dict[Any, Tensor]]:
        """Yields what was read by the end of the encoder's call: ``[P, ...]`` by signal."""
        found: dict[Any, Tensor] = {}
        shown = shown_layers(self.config)
        signals = (s for one in asked for x in one.method.schedule(spec) for s in x.signals)
        wanted = {s for s in signals if isinstance(s, EncoderSignal) and s.layer in shown}
        output = {s for s in wanted if s.uses == "output"}
        layer = self.vision_tower.encoder.layer[-1]
        hooks: list[Any] = []
        if wanted - output:
            inner = layer.attention
            hear = partial(_heard, inner.num_heads, inner.scale, wanted - output, found)
            hooks.append(inner.attn.register_forward_pre_hook(hear))
        if output:
            hooks.append(layer.register_forward_hook(partial(_left_layer, output, found)))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def _heard(
    heads: int, scale: float, wanted: set[Any], found: dict[Any, Tensor], module: Any, args: Any
) -> None:
    query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in args[:2])
    seen = EncoderSeen(1, True, query=query, key=key, scale=scale)
    found.update({signal: signal.read(seen) for signal in wanted})


def _left_layer(
    wanted: set[Any], found: dict[Any, Tensor], module: Any, args: Any, out: Any
) -> None:
    seen = EncoderSeen(1, True, hidden=out[0] if isinstance(out, tuple) else out)
    found.update({signal: signal.read(seen) for signal in wanted})


def _blocks_of(value: Tensor, config: Any) -> Tensor:
    """Of patches ``[P, n, ...]`` the means over those of each token, ``[N, ...]``."""
    index = blocks(config).to(value.device)
    return torch.cat([tile[index].mean(1) for tile in value])
