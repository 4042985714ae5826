# SPDX-License-Identifier: Apache-2.0
"""What a method may be shown before it selects: an open set, one small class a signal.

A signal says what a model must have for it (``requires``), what it looks at (``uses``), how it is
read from that (:meth:`read`), and which axis of the result counts tokens (``token_dim``). The
machine calls :meth:`read` where the tensors are; it knows no signal by name, so a method of another
package brings its own by a subclass. Whatever attention kernel the model runs stays on: scores are
computed beside it, for the rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from visprune import ops
from visprune.core.tokens import VisualTokens

EncoderLayer = int | float | Literal["last", "feature", "own"]
DecoderLayer = Literal["previous", "own"]
EncoderUse = Literal["attention", "output", "entry"]
DecoderUse = Literal["attention", "states", "sequence", "input", "ahead"]


class Capabilities(Protocol):
    """What is asked of a model's description."""

    def why_not(self, capability: str) -> str | None:
        """Return why the model has not a capability, ``None`` where it has."""


@dataclass(frozen=True)
class Signal:
    """Base of all signals; equal signals are one.

    Attributes:
        requires: capabilities that a model must have: ``"encoder_attention"`` (queries and keys of
            encoder layers can be read, one patch or a known set of patches per token),
            ``"cls_token"``, ``"every_query"`` (of those, all tokens' queries),
            ``"encoder_features"``, ``"decoder"``.
    """

    requires: ClassVar[tuple[str, ...]] = ()

    def missing(self, model: Capabilities) -> str | None:
        """Return why a model cannot show it, or ``None``."""
        return next((why for x in self.requires if (why := model.why_not(x)) is not None), None)


@dataclass(frozen=True)
class TokenSignal(Signal):
    """Something that the tokens of a stage show by themselves: places, sizes, features."""

    def read(self, tokens: VisualTokens) -> Tensor:
        """What methods get of B pictures of N tokens: ``[B, ...]``."""
        raise NotImplementedError  # pragma: no cover - abstract


@dataclass(frozen=True)
class PictureSignal(Signal):
    """Something of a picture's pixels."""

    def read(self, pixels: Tensor) -> Any:
        """What methods get of one picture, of the pixels that its encoder is given."""
        raise NotImplementedError  # pragma: no cover - abstract

    def of_batch(self, pixels: Tensor) -> Any:
        """The same of each picture of a batch ``[B, ...]``, where an encoder is given one."""
        return tuple(self.read(picture) for picture in pixels)

    def joined(self, parts: list[Any]) -> Any:
        """What they get of a picture that was encoded in parts (tiles), of what each part gave."""
        return tuple(parts)


@dataclass
class EncoderSeen:
    """What one layer of an image encoder shows, of all pictures of a call.

    Attributes:
        prefix: tokens before the patches (class, distillation, registers).
        has_cls: whether the first of them is a class token.
        hidden: states that leave the layer, ``[P, T, D]``, for signals that use ``"output"``.
        query: after norm and rotary, ``[P, H, T, d]``, for those that use ``"attention"``.
        key: ``[P, Hk, T, d]``.
        scale: of the scores.
        bias: what is added to the scores of each key, ``[P, T]``.
        entering: states that enter the layer, ``[P, T, D]``, for signals that use ``"entry"``.
        before: those that entered the layer before it, ``[P, T, D]``.
    """

    prefix: int
    has_cls: bool
    hidden: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    entering: Tensor | None = None
    before: Tensor | None = None

    def attention(self) -> tuple[Tensor, Tensor]:
        """Queries and keys.

        Raises:
            LookupError: they were not shown: the signal does not say that it uses them.
        """
        return _there(self.query, "attention"), _there(self.key, "attention")

    def states(self) -> Tensor:
        """The states that leave the layer; raises as :meth:`attention` does."""
        return _there(self.hidden, "output")

    def entry(self) -> tuple[Tensor, Tensor]:
        """States that enter the layer and the one before; raises as :meth:`attention` does."""
        return _there(self.entering, "entry"), _there(self.before, "entry")


@dataclass(frozen=True)
class EncoderSignal(Signal):
    """Something of one layer of the image encoder.

    Attributes:
        layer: 0-based, a fraction of the depth as of a :class:`Site`, ``"last"``, ``"feature"``
            (whose output the model reads: the last but one in LLaVA), or ``"own"``: the layer that
            the stage acts in, the only one to have inside an encoder.
        uses: ``"attention"``: its queries and keys; ``"output"``: the states that leave it;
            ``"entry"``: those that enter it and the layer before, for a stage on entering it.
        token_dim: the axis of the result that counts patches, from the end.
        every: of attention, whether it reads the queries of all tokens, or at most the first's.
    """

    requires: ClassVar[tuple[str, ...]] = ("encoder_attention",)
    uses: ClassVar[EncoderUse] = "attention"
    token_dim: ClassVar[int] = -1
    every: ClassVar[bool] = True

    layer: EncoderLayer = "feature"

    def read(self, seen: EncoderSeen) -> Tensor:
        """The signal of all pictures: ``[P, ...]`` with the patches along ``token_dim``."""
        raise NotImplementedError  # pragma: no cover - abstract

    def macs(self, tokens: int, width: int) -> int:
        """Multiply-adds of reading it of one picture: T tokens, ``width`` features of all heads."""
        return 0


@dataclass
class DecoderSeen:
    """What a decoder layer shows, of all samples of a call, slot by slot.

    Attributes:
        hidden: states that enter the layer, ``[B, P, D]``.
        last: the slot of each sample's query, the last token of its prompt, ``[B]``.
        visual: which slots hold visual tokens, newlines and other protected ones too, ``[B, P]``.
        valid: which hold no padding, ``[B, P]``.
        prompt: which belong to the prompt (an answer that came with it does not), ``[B, P]``.
        query: post-rotary, ``[B, H, P, d]``, for signals that use ``"attention"``.
        key: of stored and new slots, ``[B, Hk, C + P, d]``.
        value: ``[B, Hk, C + P, d]``.
        scale: of the scores.
        softcap: bound of the scores, where the model has one.
        stored: C, slots that were in the cache before.
        mask: for chosen query slots ``[B, R]``: which keys are visible, or what is added to their
            scores, ``[B, 1 or H, 1 or R, C + P]``; ``None``: all.
        rotary: the tables of the rotary embedding at the slots' positions, cosines and sines.
        ids: ids of the tokens in the slots, ``[B, P]``, where the call had them.
        norm: the norm behind the last layer.
        embedded: whether these are input embeddings (a stage at the projector).
        spent: multiply-adds of what was read, per sample without its padding, ``[B]``; ``None``:
            nothing was.
    """

    hidden: Tensor
    last: Tensor
    visual: Tensor
    valid: Tensor
    prompt: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    stored: int = 0
    mask: Callable[[Tensor], Tensor | None] | None = None
    rotary: Callable[[], tuple[Tensor, Tensor]] | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    ids: Tensor | None = None
    embedded: bool = False
    spent: Tensor | None = None

    def queries(self, which: Literal["last", "text", "after_image", "all"]) -> Tensor:
        """Slots of queries, -1 in padding, ``[B, R]``.

        Args:
            which: the prompt's ``"last"`` token; all its ``"text"``; the text ``"after_image"``,
                after the first visual token; ``"all"`` of its tokens.
        """
        if which == "last":
            return self.last[:, None]
        chosen = self.valid & self.prompt
        if which != "all":
            chosen = chosen & ~self.visual
        if which == "after_image":
            chosen = chosen & (self.visual.long().cumsum(1) > 0)
        width = max(1, int(chosen.sum(1).max()))
        steps = torch.arange(chosen.shape[1], device=chosen.device)
        return torch.where(chosen, steps, -1).topk(width, dim=1).values.flip(1)

    def rows(self, at: Tensor) -> Tensor:
        """Attention of the query slots ``at`` ``[B, R]`` to all keys, ``[B, H, R, C + P]``.

        Of -1 the row of slot 0, which means nothing.
        """
        query, key = _there(self.query, "attention"), _there(self.key, "attention")
        place = at.clamp(min=0).to(query.device)
        chosen = place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        rows = query.gather(2, chosen)
        mask = None if self.mask is None else self.mask(place)
        pairs = (at >= 0).sum(1) * (self.stored + self.valid.sum(1).to(at.device))  # [B]
        spent = pairs * query.shape[1] * key.shape[3]
        self.spent = spent if self.spent is None else self.spent + spent
        return ops.attention_rows(
            rows, key, scale=self.scale, mask=mask, query_idx=place + self.stored, causal=True,
            softcap=self.softcap,
        )  # fmt: skip

    def attention(self) -> tuple[Tensor, Tensor]:
        """Queries of the new slots and keys of all; raises ``LookupError`` if not shown."""
        return _there(self.query, "attention"), _there(self.key, "attention")

    def new(self, x: Tensor) -> Tensor:
        """Of what is there for every key ``[..., C + P]``, the part of the new slots."""
        return x[..., self.stored :]


@dataclass(frozen=True)
class DecoderSignal(Signal):
    """Something of a decoder layer, or of the sequence that enters it.

    Attributes:
        layer: ``"previous"``: the layer before the one that the stage acts at, as it ran;
            ``"own"``: that layer, ahead of its run, from its own projections.
        uses: ``"attention"``: queries, keys and values of that layer; ``"states"``: what entered
            that layer; ``"sequence"``: what the stage itself is given (its layer does not matter,
            and it is there at the projector too); ``"input"``: what enters the first layer;
            ``"ahead"``: of a first pass (:class:`visprune.core.signals.AheadSignal`).
        reads_values: whether it looks at ``seen.value``; ahead of a layer's run values are not
            computed if no signal does, and ``seen.value`` is ``None``.
        token_dim: the axis of the result that counts slots, from the end; ``None``: it belongs to
            the sample as a whole.
    """

    requires: ClassVar[tuple[str, ...]] = ("decoder",)
    uses: ClassVar[DecoderUse] = "attention"
    token_dim: ClassVar[int | None] = -1
    reads_values: ClassVar[bool] = True

    layer: DecoderLayer = "previous"

    @property
    def unrotated(self) -> bool:
        """Whether queries and keys are wanted as they are before the rotary embedding."""
        return False

    def read(self, seen: DecoderSeen) -> Tensor:
        """The signal of all samples: ``[B, ...]``, slots along ``token_dim``."""
        raise NotImplementedError  # pragma: no cover - abstract


def _there(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise LookupError(f"The signal reads what it does not say it uses: uses = {what!r}.")
    return tensor
