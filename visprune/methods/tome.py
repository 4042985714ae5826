# SPDX-License-Identifier: Apache-2.0
"""ToMe: merge similar tokens in every layer (ICLR 2023, arXiv:2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visprune import ops
from visprune.core import (
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    StepBudget,
    VisualTokens,
)
from visprune.core.numeric import is_whole, plain
from visprune.core.signals import EncoderKeys
from visprune.errors import BudgetError, ConfigError


@dataclass(frozen=True, kw_only=True)
class ToMe(PruningMethod):
    """Merges ``r`` pairs of patches between attention and MLP of every layer of an encoder.

    Patches alternate between two sets; each of the first proposes to the one of the second whose
    key (mean over heads) has the largest cosine, and the ``r`` most similar pairs merge into their
    mean, weighted by the patches that each side stands for. At most half of the patches merge in a
    layer: a larger ``r`` is cut to that, as in the official code. Attention then adds the logarithm
    of a key's size (proportional attention).

    Differences from the official code, which patches timm's classes: layer scale, norms of queries
    and keys, gates and rotary embeddings stay (it drops the first two); every prefix token is kept
    out of the matching, registers too; average and attention pooling weigh a token by its size.
    With r = 0 the model is bit for bit what it was. Ties keep the lower index.

    Args:
        r: pairs merged in each layer: one number for all, or a list with one per layer.
        inflect: of one number, a linear schedule with the same sum as the official code has it:
            -1 falls from ``2 r`` to 0, 1 rises, 0 is constant.
        prop_attn: proportional attention; the official code leaves it out for MAE models.
    """

    name: ClassVar[str] = "tome"
    size_weighted: ClassVar[bool] = True
    gives_back: ClassVar[bool] = True

    r: int | Sequence[int]
    inflect: float = 0.0
    prop_attn: bool = True

    def __post_init__(self) -> None:
        """Check ``r``."""
        super().__post_init__()
        object.__setattr__(self, "r", plain(tuple(self.r) if isinstance(self.r, list) else self.r))
        given = self.r if isinstance(self.r, tuple) else (self.r,)
        if not given or any(not is_whole(x) or x < 0 for x in given):
            raise BudgetError(
                f"r is how many pairs merge in a layer, at least 0: one number, or one per layer; "
                f"got {self.r!r}."
            )
        if self.inflect and (isinstance(self.r, tuple) or not -1.0 <= self.inflect <= 1.0):
            raise ConfigError(
                f"inflect bends one number r over the layers, by -1 to 1; got {self.inflect} and "
                f"r={self.r!r}."
            )

    @property
    def size_bias(self) -> bool:
        """Proportional attention."""
        return self.prop_attn

    def per_layer(self, layers: int) -> list[int]:
        """Pairs merged in each of ``layers`` layers.

        Raises:
            BudgetError: a list of another length.
        """
        if isinstance(self.r, int):
            low = int(self.r * (1.0 - self.inflect))
            slope = 2 * (self.r - low) / max(1, layers - 1)
            return [int(low + slope * layer) for layer in range(layers)]
        if len(self.r) != layers:
            raise BudgetError(
                f"r has {len(self.r)} numbers and the encoder {layers} layers. Give one number per "
                f"layer, or one for all."
            )
        return list(self.r)

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage in every layer."""
        needs = (EncoderKeys("own"),)
        return tuple(
            Stage(Site.encoder(layer, after_attention=True), StepBudget(num_drop=r), needs)
            for layer, r in enumerate(self.per_layer(spec.encoder_layers))
        )

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Match, and merge by size."""
        count = tokens.num_tokens
        r = count - ctx.num_keep
        if r == 0:
            return Selection.identity(tokens.features.shape[0], count, tokens.features.device)
        index, source, slot = ops.bipartite_pairs(ctx[EncoderKeys("own")], r, ctx.prefix)
        return Selection.mean(index, source, slot, tokens.size)

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines of one half of the patches with the other."""
        return 0 if keep == count else (count // 2) * (count - count // 2) * width
