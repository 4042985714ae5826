# SPDX-License-Identifier: Apache-2.0
"""Keys per channel and values per token in few bits, as KVQuant and KIVI store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, KeyNorm, Quantise, Scope
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KVQuant(CacheMethod):
    """All slots in few bits: a scale for a key's channel, one for the values of a slot.

    **Score**: none is needed (of a budget, the norm of the key). **Budget**: all stay, unless one
    is given; then the rest is dropped first. **Action**: codes of ``bits`` bits. **Scope**: as
    given; what is not counted stays plain, and so do tokens that are decoded.

    From KVQuant (arXiv:2401.18079) it takes the channels of keys; levels are even and keys are
    those behind the rotary embedding, as in KIVI (arXiv:2402.02750). Its uneven levels, its sparse
    outliers and keys before the embedding, all of which need a calibration, are not here.

    Args:
        bits: 2, 4 or 8.
        group: slots of a channel that share a scale.
    """

    name: ClassVar[str] = "kvquant"
    decides: ClassVar[bool] = True

    bits: int = 4
    group: int = 32

    def __post_init__(self) -> None:
        """Check the bits."""
        super().__post_init__()
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"bits is 2, 4 or 8, got {self.bits}.")
        if self.group < 1:
            raise ConfigError(f"group is a number of slots, at least 1; got {self.group}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Norms, all stay, codes."""
        action = Quantise(self.bits, self.bits, 0.0, self.group, separable=False)
        return Eviction(KeyNorm(), self.amount, action=action, scope=Scope(self.scope))
