# SPDX-License-Identifier: Apache-2.0
"""One encoded picture made shorter, outside of any model: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from visprune.core.method import Context, ModelSpec
from visprune.core.signals.base import EncoderSignal, Signal, TokenSignal
from visprune.core.slots import in_order
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError
from visprune.machine.choose import choose
from visprune.serving.asked import Asked


@dataclass(frozen=True)
class Encoded:
    """What a server knows of one picture once it is encoded.

    Attributes:
        rows: its tokens as the decoder would get them, ``[n, D]``.
        pos: (t, h, w) of the free ones, ``[N, 3]``.
        free: which may leave, ``[n]`` bool; ``None``: all.
        width: features that methods compare, the first of ``D``; ``None``: all. (Features of more
            layers may stand beside them.)
        signals: of the encoder and the pixels, by signal; those of tokens ``[N, ...]``.
        kind: image or video.
    """

    rows: Tensor
    pos: Tensor
    free: Tensor | None = None
    width: int | None = None
    signals: Mapping[Signal, Any] | None = None
    kind: Literal["image", "video"] = "image"


def shorten(asked: Asked, picture: Encoded, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Prune one picture.

    Args:
        asked: the method.
        picture: the picture.
        spec: the model.

    Returns:
        Rows that are left, ``[k, D]``, and the place of each among those that came, ``[k]``; in the
        order in which the decoder gets them.

    Raises:
        ConfigError: the method kept another number than it said it would.
    """
    rows, device = picture.rows, picture.rows.device
    free = picture.free
    own = torch.arange(len(rows), device=device)
    fixed = own[:0]
    if free is not None:
        free = free.to(device)
        own, fixed = own[free], own[~free]
    pos, signals = picture.pos.to(device), picture.signals or {}
    tokens, size = rows[own], torch.ones(len(own), device=device)
    alive = torch.arange(len(own), device=device)
    for number, stage in enumerate(asked.method.schedule(spec)):
        shown = VisualTokens(
            features=tokens[None, :, : picture.width], size=size[None], pos=pos[alive][None],
            kind=picture.kind,
        )  # fmt: skip
        context = Context(
            stage=number,
            signals={s: _of(s, signals.get(s), alive, shown) for s in stage.signals
                     if s in signals or isinstance(s, TokenSignal)},
            original=len(pos),
        )  # fmt: skip
        with torch.no_grad():
            selection = choose(asked.method, stage, shown, context)
        tokens = selection.reduce(tokens[None])[0]
        size = selection.sizes(size[None])[0]
        alive = alive[selection.index[0]]
    places = own[alive]
    wanted = asked.count(picture.pos, picture.kind, spec)
    if len(places) != wanted:
        raise ConfigError(
            f"{asked.method.name} kept {len(places)} of {len(pos)} tokens where it had announced "
            f"{wanted}; the prompt holds a place for each of those."
        )
    order = in_order(fixed, [places])
    return torch.cat([rows[fixed], tokens])[order], torch.cat([fixed, places])[order]


def _of(signal: Signal, value: Any, alive: Tensor, tokens: VisualTokens) -> Any:
    """A signal as a stage is shown it, of a batch of one."""
    if isinstance(signal, TokenSignal):
        return signal.read(tokens)
    if isinstance(signal, EncoderSignal):
        return value[alive.to(value.device)][None].movedim(1, signal.token_dim)
    return (value,)
