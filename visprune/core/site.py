# SPDX-License-Identifier: Apache-2.0
"""Where a sequence of visual tokens may shrink."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from visprune.core.numeric import is_number, plain
from visprune.errors import ConfigError

SiteKind = Literal["pixels", "encoder", "projector", "decoder", "cache"]


@dataclass(frozen=True)
class Site:
    """A place in a vision-language model where tokens may leave.

    ``layer`` is the 0-based layer on *entering* which the tokens are gone ("layer K"), or a float
    in (0, 1): a fraction of the depth, floored to a layer (``7/8`` of 32 layers is layer 28).
    ``after_attention``: not on entering the layer but between its attention and its MLP.
    """

    kind: SiteKind
    layer: int | float | None = None
    after_attention: bool = False

    @classmethod
    def pixels(cls) -> Site:
        """Before the image encoder, which is given fewer patches."""
        return cls("pixels")

    @classmethod
    def encoder(cls, layer: int | float, *, after_attention: bool = False) -> Site:
        """Inside the image encoder, on entering ``layer`` or between its attention and its MLP."""
        return cls("encoder", layer, after_attention)

    @classmethod
    def projector(cls) -> Site:
        """After the projector, before the first decoder layer."""
        return cls("projector")

    @classmethod
    def decoder(cls, layer: int | float) -> Site:
        """Between decoder layers, on entering ``layer``."""
        return cls("decoder", layer)

    @classmethod
    def cache(cls) -> Site:
        """In the key-value cache, after prefill."""
        return cls("cache")

    def resolve(self, num_layers: int) -> int:
        """Return the 0-based layer of this site in a stack of ``num_layers``.

        Raises:
            ConfigError: the layer does not exist.
        """
        layer = plain(self.layer)
        if not is_number(layer):
            raise ConfigError(f"Site {self} has no layer; give an int or a fraction of the depth.")
        if isinstance(layer, float) and not layer.is_integer():
            if not 0.0 < layer < 1.0:
                raise ConfigError(f"A fractional layer lies between 0 and 1, got {layer}.")
            # 1e-9: 0.29 * 100 is 28.999999999999996 in binary and means layer 29.
            return min(num_layers - 1, max(1, math.floor(layer * num_layers + 1e-9)))
        layer = int(layer)
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"{self.kind} layer {layer} does not exist: the model has {num_layers} {self.kind} "
                f"layers, 0 to {num_layers - 1}. Give one of those or a fraction of the depth."
            )
        return layer

    def depth(self, num_layers: int) -> tuple[int, int]:
        """Where the site stands in the order in which a model runs; ``num_layers`` of the decoder.

        Sites inside an encoder are not told apart: one method at a time acts there.
        """
        order = ("pixels", "encoder", "projector", "decoder", "cache").index(self.kind)
        return order, self.resolve(num_layers) if self.kind == "decoder" else 0

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return f"{self.kind}({self.layer}{', after attention' if self.after_attention else ''})"
