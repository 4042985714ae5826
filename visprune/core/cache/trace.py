# SPDX-License-Identifier: Apache-2.0
"""What a cache holds after its eviction, layer by layer and head by head."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class CacheTrace:
    """What was stored before and after an eviction, of every sample, layer and key head.

    Attributes:
        before: slots of each layer before, ``[sample][layer]``, padding not counted.
        slots: slots of each head after, ``[sample][layer][head]``.
        nbytes: bytes of their keys and values, with scales, biases and what else is read.
        kept: the positions in the prompt that each head keeps, ``[sample][layer][head]`` of
            ``[n]`` tensors; -1 for a slot that stands for several dropped ones.
        form: of each layer: ``"whole"`` (nothing left; a recurrent layer's state, of which it
            counts no slot and no byte, never is cut), ``"even"`` (a shorter tensor), ``"ragged"``
            (heads with their own lengths, one after the other), or what else stores it.
        allocated: bytes that each layer's tensors take for the whole batch, padding and room to
            grow included.
        later: of a prompt's: the evictions since, as tokens were decoded in this run.
    """

    before: list[list[int]] = field(default_factory=list)
    slots: list[list[list[int]]] = field(default_factory=list)
    nbytes: list[list[list[int]]] = field(default_factory=list)
    kept: list[list[list[Tensor]]] = field(default_factory=list)
    form: list[str] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    later: list[CacheTrace] = field(default_factory=list)

    @classmethod
    def empty(cls, samples: int) -> CacheTrace:
        """Of no layer yet."""
        rows = range(samples)
        return cls([[] for _ in rows], [[] for _ in rows], [[] for _ in rows], [[] for _ in rows])

    def bytes_of(self, sample: int) -> int:
        """Bytes of all layers of a sample."""
        return sum(sum(heads) for heads in self.nbytes[sample])

    def mean_slots(self, sample: int) -> list[float]:
        """Of every layer of a sample, the mean over its heads."""
        return [sum(heads) / len(heads) for heads in self.slots[sample]]
