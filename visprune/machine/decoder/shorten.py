# SPDX-License-Identifier: Apache-2.0
"""Run one stage of a method behind the encoder: show it its signals, and shorten the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from visprune.core.budget import Stage
from visprune.core.chain import Act
from visprune.core.method import Context
from visprune.core.selection import Selection
from visprune.core.signals.base import DecoderSeen, DecoderSignal, EncoderSignal, TokenSignal
from visprune.core.tokens import VisualTokens
from visprune.machine.choose import Observer, choose
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.images import ImageState, Step


def run_stage(
    act: Act,
    stage: Stage,
    fwd: Forward,
    hidden: Tensor,
    observers: Sequence[Observer] = (),
    learned: nn.Module | None = None,
) -> Step:
    """Let a stage choose from every image; returns what shortens the hidden states.

    Args:
        act: whose stage it is, and which of that method's.
        stage: the stage, with those of its wants that the model has.
        fwd: the forward, with the decoder signals that the stage needs.
        hidden: states of the current slots, ``[B, P, D]``.
        observers: see :func:`visprune.machine.choose.choose`.
        learned: the stage's own module, of a method that has parameters.
    """
    acts = [_of_clip(act, stage, image, fwd) for image in fwd.images]
    before = [len(image.tokens) for image in fwd.images]
    chosen: list[tuple[ImageState, Selection]] = []
    evidence: dict[str, dict[int, float]] = {}
    # What is chosen has no gradient; and what a checkpointed recomputation does not run again may
    # save nothing for backward. Features are gathered and merged, with gradients, in the step.
    with torch.no_grad():
        _sequence_signals(stage, fwd, hidden)
        for group in _groups(fwd, act):
            tokens = _visual_tokens([image for _, image in group], hidden)
            own = acts[group[0][0]]
            context = Context(
                stage=act.number,
                signals=_signals(stage, fwd, [image for _, image in group], tokens),
                original=_original(group[0][1], act),
                learned=learned,
            )
            selection = choose(own.method, own.stage, tokens, context, observers)
            for place, (order, image) in enumerate(group):
                fwd.trace.spend(image.layout.row, selection.macs)
                row = selection.row(place)
                chosen.append((image, row))
                for name, value in row.evidence.items():
                    evidence.setdefault(name, {})[order] = round(float(value), 6)
    totals = [_original(image, act) for image in fwd.images]
    step = fwd.take(chosen, weigh=act.weighs)
    fwd.trace.stages.append(
        {
            "site": str(stage.site),
            **({} if act.member is None else {"method": act.method.name}),
            "before": before,
            "clamped": [n for n, x in enumerate(totals) if _clamps(acts[n].stage, x)],
            "after": [len(image.tokens) for image in fwd.images],
            **{
                name: [values.get(n) for n in range(len(fwd.images))]
                for name, values in evidence.items()
            },
        }
    )
    return step


def read_layer(stages: Sequence[Stage], fwd: Forward, seen: DecoderSeen, uses: str) -> None:
    """Read the signals of some stages from a layer, and leave them in the forward.

    Args:
        stages: whose signals.
        fwd: the forward.
        seen: what the layer shows.
        uses: read those that use this.
    """
    with torch.no_grad():
        for stage in stages:
            for signal in stage.signals:
                if isinstance(signal, DecoderSignal) and signal.uses == uses:
                    fwd.signals[signal], fwd.read_at[signal] = signal.read(seen), fwd.table
    if seen.spent is not None:
        for row, macs in enumerate(seen.spent.tolist()):
            fwd.trace.spend(row, macs)
    seen.spent = None


def seen_by(fwd: Forward, hidden: Tensor, layer: int) -> DecoderSeen:
    """What every signal may look at of the current sequence, before ``layer``."""
    return DecoderSeen(
        hidden=hidden,
        last=fwd.query_slots(),
        visual=fwd.visual_slots(),
        valid=fwd.table.valid,
        prompt=fwd.prompt_slots(),
        mask=lambda at: fwd.row_mask(layer, at),
        rotary=lambda: _tables(fwd, hidden, layer),
        norm=fwd.adapter.final_norm,
        ids=fwd.slot_ids(),
    )


def _tables(fwd: Forward, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines at the positions of the current slots."""
    ids = fwd.table_positions(fwd.table, layer)
    if ids.dim() == 3 and ids.shape[0] == 4:  # a line of ids for masks, before (t, h, w)
        ids = ids[1:]
    cosine, sine = fwd.adapter.rotary(hidden, ids, fwd.adapter.kind_of(layer))
    return cosine, sine


def _sequence_signals(stage: Stage, fwd: Forward, hidden: Tensor) -> None:
    """Signals of what enters the stage itself."""
    if any(isinstance(s, DecoderSignal) and s.uses == "sequence" for s in stage.signals):
        read_layer([stage], fwd, seen_by(fwd, hidden, 0), "sequence")


def _of_clip(act: Act, stage: Stage, image: ImageState, fwd: Forward) -> Act:
    """The act on an image, with the stage as it is shown what the model has."""
    return replace(act, stage=stage).of_clip(image.layout.picture.frames, fwd.adapter.spec)


def _clamps(stage: Stage, total: int) -> bool:
    """Whether a budget is more than an image has."""
    return stage.budget is not None and stage.budget.clamps(total)


def _original(image: ImageState, act: Act) -> int:
    """Tokens that an image had before a method; of a chain, when the member's first stage began."""
    if act.member is None:
        return len(image.layout.picture.pos)
    return image.given.setdefault(act.member, len(image.tokens))


def _groups(fwd: Forward, act: Act) -> list[list[tuple[int, ImageState]]]:
    """Images of the same grid and count are selected in one call; those that are gone, in none."""
    groups: dict[Any, list[tuple[int, ImageState]]] = {}
    for order, image in enumerate(fwd.images):
        picture = image.layout.picture
        if len(image.tokens):
            original = _original(image, act)
            count = (len(image.tokens), original, len(picture.pos))
            key = (count, picture.kind, picture.frames, picture.extent)
            groups.setdefault(key, []).append((order, image))
    return list(groups.values())


def _visual_tokens(images: list[ImageState], hidden: Tensor) -> VisualTokens:
    slots = torch.stack([image.slots for image in images]).to(hidden.device)
    rows = torch.tensor([image.layout.row for image in images], device=hidden.device)
    return VisualTokens(
        features=hidden[rows[:, None], slots],
        size=torch.stack([image.size for image in images]).to(hidden.device),
        pos=torch.stack(
            [image.layout.picture.pos.to(image.tokens.device)[image.tokens] for image in images]
        ).to(hidden.device),
        kind=images[0].layout.picture.kind,
    )


def _signals(
    stage: Stage, fwd: Forward, images: list[ImageState], tokens: VisualTokens
) -> dict[Any, Any]:
    """Every signal of a stage that is there, for the images of one group."""
    found: dict[Any, Any] = {}
    for signal in stage.signals:
        if isinstance(signal, DecoderSignal):
            if signal in fwd.signals:
                found[signal] = _of_images(signal, fwd, images)
            continue
        if isinstance(signal, TokenSignal):
            found[signal] = signal.read(tokens)
            continue
        known: list[Any] = [image.layout.picture.signals.get(signal) for image in images]
        if any(value is None for value in known):
            continue
        if not isinstance(signal, EncoderSignal):
            found[signal] = tuple(known)
            continue
        own = [value[im.tokens.to(value.device)] for value, im in zip(known, images, strict=True)]
        found[signal] = torch.stack(own).movedim(1, signal.token_dim)
    return found


def _of_images(signal: DecoderSignal, fwd: Forward, images: list[ImageState]) -> Tensor:
    """A decoder signal's part of each image: ``[G, ...]``."""
    value = fwd.signals[signal]
    if signal.token_dim is None:
        return torch.stack([value[image.layout.row] for image in images])
    axis = signal.token_dim
    places = [_slots_then(fwd, signal, image).to(value.device) for image in images]
    return torch.stack(
        [
            value[image.layout.row].index_select(axis, at)
            for image, at in zip(images, places, strict=True)
        ]
    )


def _slots_then(fwd: Forward, signal: DecoderSignal, image: ImageState) -> Tensor:
    """Where an image's tokens were when a signal was read: a stage at the same layer may have run.

    A merged token was where the token was that it stands for.
    """
    then = fwd.read_at[signal]
    if then is fwd.table:
        return image.slots
    row = image.layout.row
    return then.places()[row, fwd.table.index[row, image.slots]]
