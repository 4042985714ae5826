# SPDX-License-Identifier: Apache-2.0
"""Pictures of different sizes in one batch, padded to one length behind their patches.

Each picture is reduced as if it were alone: what a stage is shown of it is read without the
padding, its budget is of its own patches, and the slots of the batch are padded anew. Pictures of
one size stay of one size, so a batch falls into the same groups at every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visprune.core.method import Context
from visprune.core.selection import Selection
from visprune.core.signals.base import EncoderSeen, EncoderSignal, PictureSignal
from visprune.core.tokens import VisualTokens
from visprune.errors import UnsupportedModel


@dataclass(frozen=True)
class Group:
    """Pictures of a batch that have the same number of patches.

    Attributes:
        rows: which, ``[G]``.
        length: patches of each before the first layer.
        pictures: what methods are shown of their pixels.
    """

    rows: Tensor
    length: int
    pictures: Mapping[Any, Any]


@dataclass(frozen=True)
class ByGroup:
    """What brings the patches of pictures of several sizes back, those of one size at a time.

    Attributes:
        parts: for each size: the pictures ``[G]``, their patches, and by what some of those left.
        total: patches of the largest.
    """

    parts: list[tuple[Tensor, int, Selection]]
    total: int

    def restore(self, kept: Tensor) -> Tensor:
        """``[B, K, D]``, padded, to ``[B, N, D]``; zeros in the padding."""
        whole = kept.new_zeros(kept.shape[0], self.total, kept.shape[-1])
        for rows, count, chosen in self.parts:
            whole[rows, :count] = chosen.expand(kept[rows, : chosen.num_slots])
        return whole


def group(lengths: Tensor, pixels: Tensor, signals: Iterable[PictureSignal]) -> list[Group]:
    """The groups of a batch ``[B, N, ...]`` whose pictures have ``lengths`` ``[B]`` patches."""
    wanted, found = list(signals), []
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0].to(pixels.device)
        own = pixels[rows, :length]
        found.append(Group(rows, length, {s: s.of_batch(own) for s in wanted}))
    return found


def hidden(counts: Tensor, total: int, prefix: int) -> Tensor:
    """What attention adds to the scores of each key, -inf in the padding: ``[B, P + N]``."""
    there = torch.arange(total, device=counts.device) < counts[:, None]
    bias = torch.zeros(there.shape, device=counts.device).masked_fill_(~there, -torch.inf)
    return torch.nn.functional.pad(bias, (prefix, 0))


def read(
    groups: list[Group], counts: Tensor, signals: Iterable[EncoderSignal], seen: EncoderSeen
) -> list[dict[Any, Tensor]]:
    """Signals of a layer by group, each read without the padding of its pictures."""
    wanted, found = list(signals), []
    for one in groups:
        last = seen.prefix + int(counts[one.rows[0]])
        own = replace(
            seen,
            query=_until(seen.query, one.rows, 2, last),
            key=_until(seen.key, one.rows, 2, last),
            bias=_until(seen.bias, one.rows, 1, last),
            entering=_until(seen.entering, one.rows, 1, last),
            before=_until(seen.before, one.rows, 1, last),
        )
        found.append({signal: signal.read(own) for signal in wanted})
    return found


def _until(x: Tensor | None, rows: Tensor, axis: int, last: int) -> Tensor | None:
    """Pictures ``rows`` of ``x``, along ``axis`` without the padding."""
    return None if x is None else x[rows].narrow(axis, 0, last)


def select(
    groups: list[Group],
    signals: list[dict[Any, Tensor]],
    counts: Tensor,
    tokens: VisualTokens,
    context: Context,
    choose: Callable[[VisualTokens, Context], Selection],
) -> Selection:
    """Let a stage choose from the pictures of one size at a time.

    Args:
        groups: those of the batch.
        signals: what the layer showed of each.
        counts: tokens of each picture, ``[B]``.
        tokens: of all, padded.
        context: what the stage is shown of all.
        choose: the choice among pictures of one count.

    Returns:
        The selection of the batch, its slots padded.
    """
    rows: dict[int, Selection] = {}
    parts: list[tuple[Tensor, int, Selection]] = []
    for one, read_of in zip(groups, signals or [{}] * len(groups), strict=True):
        count = int(counts[one.rows[0]])

        def part(x: Tensor, at: Tensor = one.rows, end: int = count) -> Tensor:
            return x[at, :end]

        placed = tokens.pos.numel() > 0
        own = VisualTokens(
            part(tokens.features), part(tokens.size), part(tokens.pos) if placed else tokens.pos
        )
        carried = None if context.carried is None else part(context.carried)
        shown = replace(
            context, signals={**one.pictures, **read_of}, original=one.length, carried=carried
        )
        chosen = choose(own, shown)
        rows |= {row: chosen.row(place) for place, row in enumerate(one.rows.tolist())}
        parts.append((one.rows, count, chosen))
    whole = Selection.stack([rows[row] for row in range(len(rows))])
    returns = any(chosen.restoration is not None for _, _, chosen in parts)
    back = ByGroup(parts, tokens.num_tokens) if returns else None
    return replace(whole, num_tokens=tokens.num_tokens, entered=tokens.size, restoration=back)


def refuse_dropout(total: int, given: int) -> None:
    """Raise where patches left before the first layer: which pictures they were of is not told."""
    if total != given:
        raise UnsupportedModel(
            f"The pictures of this batch have different sizes and are padded to {given} patches, "
            f"and the first layer is given {total}: patch dropout in training does not say which "
            f"of them are padding. Set patch_drop_rate=0, or give pictures of one size."
        )
