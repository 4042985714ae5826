# SPDX-License-Identifier: Apache-2.0
"""The text of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visprune.core.signals.base import DecoderSeen, DecoderSignal
from visprune.errors import ConfigError


@dataclass(frozen=True)
class TextStates(DecoderSignal):
    """States of the prompt's text, ``[B, R, D]``: at the projector, its embeddings.

    Rows of a sample with fewer tokens are zero at the front.

    Attributes:
        which: all text, or that after the first visual token.
        normed: behind the norm of the decoder's end.
    """

    uses: ClassVar[Literal["attention", "states", "sequence"]] = "sequence"
    token_dim: ClassVar[int | None] = None

    which: Literal["text", "after_image"] = "text"
    normed: bool = False

    def read(self, seen: DecoderSeen) -> Tensor:
        """The slots that hold text."""
        at = seen.queries(self.which).to(seen.hidden.device)
        place = at.clamp(min=0)[..., None].expand(-1, -1, seen.hidden.shape[-1])
        states = seen.hidden.gather(1, place)
        if self.normed:
            if seen.norm is None:
                raise LookupError("This decoder has no norm behind its last layer.")
            states = seen.norm(states)
        return torch.where((at >= 0)[..., None], states, 0.0)


@dataclass(frozen=True)
class TextIds(DecoderSignal):
    """Ids of the prompt's text, ``[B, R]`` int64, -1 at the front of a sample with fewer.

    Attributes:
        which: all text, or that after the first visual token.
    """

    uses: ClassVar[Literal["attention", "states", "sequence"]] = "sequence"
    token_dim: ClassVar[int | None] = None

    which: Literal["text", "after_image"] = "text"

    def read(self, seen: DecoderSeen) -> Tensor:
        """Those of the slots that hold text.

        Raises:
            ConfigError: the model was given embeddings and no ids.
        """
        if seen.ids is None:
            raise ConfigError(
                "The prompt's words are read from input_ids, and this call has inputs_embeds "
                "alone. Pass input_ids."
            )
        at = seen.queries(self.which).to(seen.ids.device)
        return torch.where(at >= 0, seen.ids.gather(1, at.clamp(min=0)), -1)
