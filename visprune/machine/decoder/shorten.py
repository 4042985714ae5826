# SPDX-License-Identifier: Apache-2.0
"""Run one stage of a method: show it what it needs, then shorten the sequence as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visprune.core.budget import Budget, Stage
from visprune.core.method import Context, PruningMethod
from visprune.core.selection import Selection
from visprune.core.slots import gather_sequence
from visprune.core.tokens import VisualTokens
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.images import ImageState

Step = Callable[[Tensor], Tensor]


def run_selection(
    method: PruningMethod, stage: Stage, budget: Budget, number: int, fwd: Forward, hidden: Tensor
) -> Step:
    """Let every image keep its budget; returns what shortens the hidden states.

    Args:
        method: the method.
        stage: its stage.
        budget: the budget of that stage.
        number: the stage's place in the schedule.
        fwd: the forward, with the decoder attention that the stage needs.
        hidden: states of the current slots, ``[B, P, D]``.
    """
    before = [len(image.tokens) for image in fwd.images]
    groups, clamped = _groups(method, budget, fwd)
    chosen: list[tuple[ImageState, Selection]] = []
    # What is chosen has no gradient; and what a checkpointed recomputation does not run again may
    # save nothing for backward. Features are gathered and merged, with gradients, in the step.
    with torch.no_grad():
        for (count, keep, kind, *_), group in groups.items():
            tokens = _visual_tokens(group, hidden, kind)
            selection = method.select(tokens, _context(stage, number, keep, fwd, group))
            spent = method_macs(method, count, keep, hidden.shape[-1])
            fwd.trace.selection_macs += len(group) * spent
            sizes = selection.sizes(tokens.size)
            for place, image in enumerate(group):
                chosen.append((image, _row(selection, place)))
                image.size = sizes[place]
    step = shorten(fwd, chosen)
    fwd.trace.stages.append(
        {
            "site": str(stage.site),
            "before": before,
            "clamped": clamped,
            "after": [len(image.tokens) for image in fwd.images],
        }
    )
    return step


def _groups(
    method: PruningMethod, budget: Budget, fwd: Forward
) -> tuple[dict[Any, list[ImageState]], list[int]]:
    """Images of the same grid, count and budget are selected in one call.

    Returns:
        The groups by (count, budget, kind, ...), and the numbers of the images whose budget was
        clamped.
    """
    groups: dict[Any, list[ImageState]] = {}
    clamped: list[int] = []
    for order, image in enumerate(fwd.images):
        picture = image.layout.picture
        total = len(picture.pos)
        keep = budget.resolve(total, strict=method.strict)
        if budget.num_keep is not None and budget.num_keep > total:
            clamped.append(order)
        keep = min(keep, len(image.tokens))
        if not image.withdrawn:
            key = (len(image.tokens), keep, picture.kind, total, picture.extent)
            groups.setdefault(key, []).append(image)
    return groups, clamped


def method_macs(method: PruningMethod, count: int, keep: int, width: int) -> int:
    """Multiply-adds that a method's own rule spends on one image."""
    macs = getattr(method, "macs", None)
    return int(macs(count, keep, width)) if macs is not None else 0


def _row(selection: Selection, place: int) -> Selection:
    """The selection of one image of a group."""
    span = slice(place, place + 1)
    if selection.dest is None or selection.weight is None:
        return Selection(selection.index[span], selection.num_tokens)
    return Selection(
        selection.index[span], selection.num_tokens, selection.dest[span], selection.weight[span]
    )


def _visual_tokens(images: list[ImageState], hidden: Tensor, kind: Any) -> VisualTokens:
    slots = torch.stack([image.slots for image in images]).to(hidden.device)
    rows = torch.tensor([image.layout.row for image in images], device=hidden.device)
    return VisualTokens(
        features=hidden[rows[:, None], slots],
        size=torch.stack([image.size for image in images]).to(hidden.device),
        pos=torch.stack(
            [image.layout.picture.pos.to(image.tokens.device)[image.tokens] for image in images]
        ).to(hidden.device),
        kind=kind,
    )


def _context(
    stage: Stage, number: int, keep: int, fwd: Forward, images: list[ImageState]
) -> Context:
    """Collect what a stage asked for, for the images of one group."""
    needs = stage.needs
    pictures = [image.layout.picture for image in images]
    attention = cls_attention = keys = None
    if needs.attention == "last_query" and fwd.attention is not None:
        rows = fwd.attention  # [B, H, P]
        offset = rows.shape[-1] - fwd.table.num_slots
        attention = torch.stack(
            [rows[im.layout.row][:, im.slots.to(rows.device) + offset] for im in images]
        )
    which = needs.cls_attention
    if which is not None and all(which in picture.cls_attention for picture in pictures):
        seen = [picture.cls_attention[which] for picture in pictures]
        cls_attention = torch.stack(
            [row[:, im.tokens.to(row.device)] for row, im in zip(seen, images, strict=True)]
        )
    if needs.vision_keys:
        known = [picture.vision_keys for picture in pictures if picture.vision_keys is not None]
        keys = torch.stack(
            [key[im.tokens.to(key.device)] for key, im in zip(known, images, strict=True)]
        )
    return Context(
        num_keep=keep,
        stage=number,
        attention=attention,
        cls_attention=cls_attention,
        vision_keys=keys,
        fingerprints=tuple(picture.fingerprint for picture in pictures),
    )


def shorten(fwd: Forward, chosen: list[tuple[ImageState, Selection]]) -> Step:
    """Shorten the sequence to the chosen slots; the step writes merged features into theirs."""
    leaving = torch.zeros_like(fwd.table.valid)
    order: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(fwd.batch)]
    changed = False
    merges: list[tuple[ImageState, Tensor, Selection]] = []
    for image, selection in chosen:
        index = selection.index[0].to(image.slots.device)
        row, old = image.layout.row, image.slots
        leaving[row, old] = True
        kept = old[index]
        # Slots stay in the selection's order: one whose token lies before its predecessor's (a
        # merged token appended at the end) sorts with the predecessor.
        order[row].append((kept, kept.cummax(0).values))
        if selection.merges:
            merges.append((image, old, selection))
            changed = changed or bool((index.diff() < 0).any())
        gone = len(old) - len(kept)
        changed = changed or gone > 0
        fwd.visual[row] -= gone
        fwd.alive[row] -= gone
        image.tokens, image.slots = image.tokens[index], kept
    rel = fwd.shorten(_surviving_rows(fwd, order, leaving) if changed else None)
    writes = [(image.layout.row, old, sel, image.slots) for image, old, sel in merges]

    def step(hidden: Tensor) -> Tensor:
        out = gather_sequence(hidden, rel, 1)
        for row, old, selection, new in writes:
            merged = selection.reduce(hidden[row, old.to(hidden.device)][None])
            out[row, new.to(out.device)] = merged[0]
        return out

    return step


def _surviving_rows(
    fwd: Forward, order: list[list[tuple[Tensor, Tensor]]], leaving: Tensor
) -> list[Tensor]:
    """Slots of every sample after a stage.

    Args:
        fwd: the forward.
        order: for every sample, (slots, sort keys) of what replaces the tokens that leave.
        leaving: current slots that are not kept as they are, ``[B, P]`` bool.
    """
    rows = []
    keep = fwd.table.valid & ~leaving
    for number in range(fwd.batch):
        slots = keep[number].nonzero()[:, 0]
        parts, keys = [slots], [slots]
        for chosen, key in order[number]:
            parts.append(chosen)
            keys.append(key)
        joined = torch.cat(parts)
        rows.append(joined[torch.cat(keys).argsort(stable=True)])
    return rows


def run_withdrawal(method: PruningMethod, stage: Stage, number: int, fwd: Forward) -> Step:
    """Let all visual tokens of a sample leave, or none; returns what shortens the hidden states."""
    assert fwd.attention is not None, "a withdrawal reads the attention of the layer before"
    share = fwd.attention
    ctx = Context(num_keep=0, stage=number, attention=share)
    fire = method.withdraw(ctx).tolist()
    has = [visual > 0 for visual in fwd.visual]
    fired = [bool(f) and h for f, h in zip(fire, has, strict=True)]
    before = [len(image.tokens) for image in fwd.images]
    rows = None
    if any(fired):
        leaving = torch.zeros_like(fwd.table.valid)
        for image in fwd.images:
            row = image.layout.row
            if fired[row] and not image.withdrawn:
                leaving[row, image.slots] = True
                leaving[row, image.fixed] = True
                fwd.alive[row] -= len(image.slots) + len(image.fixed)
                image.withdrawn = True
        fwd.visual = [0 if f else v for f, v in zip(fired, fwd.visual, strict=True)]
        rows = _surviving_rows(fwd, [[] for _ in range(fwd.batch)], leaving)
    rel = fwd.shorten(rows)
    evidence = [round(x, 6) if h else None for x, h in zip(share.tolist(), has, strict=True)]
    fwd.trace.stages.append(
        {"site": str(stage.site), "before": before, "fired": fired, "share": evidence}
    )
    return lambda hidden: gather_sequence(hidden, rel, 1)
