# SPDX-License-Identifier: Apache-2.0
"""Learned scores of cache slots, in the manner of Attention-Gate (arXiv:2410.12876)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, LearnedScore, Scope
from visprune.core.numeric import is_whole
from visprune.errors import ConfigError, UnsupportedModel


class HeadScorer(nn.Module):
    """A small network for each key head of one layer: what a slot is worth, by its key and value.

    Args:
        heads: Hk.
        features: of a key and its value together.
        hidden: within the network.
    """

    def __init__(self, heads: int, features: int, hidden: int) -> None:
        super().__init__()
        self.checked = False
        self.norm = nn.LayerNorm(features, elementwise_affine=False)
        self.inner = nn.Parameter(torch.randn(heads, features, hidden) * features**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads, 1, hidden))
        self.outer = nn.Parameter(torch.randn(heads, hidden, 1) * hidden**-0.5)

    def forward(self, key: Tensor, value: Tensor) -> Tensor:
        """``[Hk, L, d]`` and ``[Hk, L, dv]`` to ``[Hk, L]``.

        Raises:
            ConfigError: the layer has other heads than it was made for.
        """
        x = torch.cat([key, value], dim=-1).to(self.inner.dtype)
        if x.shape[0] != len(self.inner) or x.shape[2] != self.inner.shape[1]:
            raise ConfigError(
                f"A scorer was made for {len(self.inner)} key heads with {self.inner.shape[1]} "
                f"features of key and value; this layer has {x.shape[0]} with {x.shape[2]}."
            )
        self.warn_if_new()
        inner = nn.functional.gelu(torch.bmm(self.norm(x), self.inner) + self.bias)
        return torch.bmm(inner, self.outer)[..., 0]

    def warn_if_new(self) -> None:
        """Say once that nothing was learned or loaded, where that is so."""
        if self.checked or self.bias.is_meta:
            return
        self.checked = True
        if not bool(self.bias.any()):  # they begin at zero
            warnings.warn(
                "The scorers of 'learned' are new and score slots at random: load a trained state "
                "into run.learned[0], or give learned=... trained ones.",
                stacklevel=2,
            )


@dataclass(frozen=True, kw_only=True)
class Learned(CacheMethod):
    """Each head keeps the slots that a small trained network of its own values most.

    **Score**: the network of the layer, by key and value. **Budget**: the same everywhere.
    **Action**: drop. **Scope**: as given.

    Attention-Gate trains a gate in front of every layer that decides, of each token and head,
    whether later tokens see it. This is the same idea at the cache: the prompt is read whole,
    networks are trained to tell how the text behind a picture will share out its attention
    (``visprune train configs/train/cache_scorer_embedded.yaml``), and a budget takes the place of
    the gate's threshold. The question is not looked at, so one cache serves many.

    The networks are new, and score at random, with a warning, until a trained state is loaded:
    ``run.learned[0].load_state_dict(...)``, or ``learned`` from an earlier run. They are
    sub-modules of the model while the run is in force, and :func:`visprune.save_pretrained` keeps
    them. Any other module takes their place: ``learned=nn.ModuleList([layers])``, where
    ``layers[n]`` gives ``[Hk, L]`` for the keys and values of decoder layer ``n``.

    Args:
        hidden: features within each network.
        learned: networks of an earlier run, to go on with.
    """

    name: ClassVar[str] = "learned"

    hidden: int = 32
    learned: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the size."""
        super().__post_init__()
        if not is_whole(self.hidden) or self.hidden < 1:
            raise ConfigError(f"hidden is a whole number, at least 1; got {self.hidden!r}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """What was learned, same everywhere, drop."""
        return Eviction(LearnedScore(), self.amount, scope=Scope(self.scope))

    def build_learned(self, spec: ModelSpec) -> nn.ModuleList:
        """A network for each key head of each layer.

        Raises:
            ConfigError: ``learned`` is not one entry for each layer, in a list.
            UnsupportedModel: heads of this model store no keys of their own.
        """
        if self.learned is None:
            if not spec.key_heads:
                raise UnsupportedModel(
                    f"learned scores slots by the keys and values of each head, and the layers of "
                    f"{spec.family} do not store those alike. Use snapkv or knorm."
                )
            shape = (spec.key_heads, spec.key_width, self.hidden)
            layers = nn.ModuleList([HeadScorer(*shape) for _ in range(spec.num_layers)])
            return nn.ModuleList([layers])
        given = self.learned
        if not isinstance(given, nn.ModuleList) or len(given) != 1 or not _fits(given[0], spec):
            raise ConfigError(
                f"learned is the run.learned of an earlier run: a ModuleList of one ModuleList "
                f"with a module for each of the {spec.num_layers} decoder layers; got "
                f"{type(given).__name__}."
            )
        return given

    def to_dict(self) -> dict[str, Any]:
        """Without the networks: they are weights, and are saved as such."""
        names = ("num_keep", "keep_ratio", "max_cache", "scope", "hidden", "positions", "strict")
        return {"method": self.name, **{name: getattr(self, name) for name in names}}


def _fits(layers: Any, spec: ModelSpec) -> bool:
    return isinstance(layers, nn.ModuleList) and len(layers) == spec.num_layers
