# SPDX-License-Identifier: Apache-2.0
"""Reduce tokens inside one image encoder: which forward a layer belongs to, and what is chosen."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import (
    EncoderAdapter,
)
from visprune.core.budget import Stage
from visprune.core.method import Context, PruningMethod
from visprune.core.selection import Selection
from visprune.core.signals.base import EncoderSeen, EncoderSignal, EncoderUse, PictureSignal
from visprune.core.signals.pictures import PatchPositions
from visprune.core.threads import PerThread
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.choose import Observer, choose
from visprune.machine.encoder import padded
from visprune.machine.encoder.plan import EncoderPlan, step
from visprune.machine.encoder.state import Away, EncoderPass, like

_NOWHERE = torch.empty(0, 0, 3, dtype=torch.int64)
_LEARNED = "visprune_learned"
_REMEMBERED = 16  # forwards whose backward may still run a checkpointed layer again


class _Current(PerThread):
    """What the hooks of one forward hand to each other.

    Attributes:
        latest: this thread's last forward.
        active: the forward whose layer runs.
    """

    latest: EncoderPass | None = None
    active: EncoderPass | None = None


class EncoderReducer:
    """One method on one encoder.

    All hooks are methods of objects that the model refers to, so a copy of the model
    (``copy.deepcopy``, an average of weights, a pickle) is pruned by itself, and has not run yet.

    Args:
        adapter: the encoder.
        method: the method.
        plan: its stages there.
        learned: modules of its stages, of a method that has parameters.
        observers: whom to tell of every choice; read at each.

    Attributes:
        handles: what takes off what :func:`visprune.machine.encoder.layer.install` has put on.
    """

    def __init__(
        self,
        adapter: EncoderAdapter,
        method: PruningMethod,
        plan: EncoderPlan,
        learned: nn.ModuleList | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.adapter, self.method, self.plan, self.learned = adapter, method, plan, learned
        self.observers = observers
        self.current = _Current()
        self._last: EncoderPass | None = None
        # Which forward a layer's input belongs to, by layer and place in memory: a checkpoint that
        # runs a layer again, in whatever thread, has nothing but its input to tell it by.
        self._inputs: dict[tuple[int, int], weakref.ref[EncoderPass]] = {}
        self._remembered: deque[EncoderPass] = deque(maxlen=_REMEMBERED)
        self.handles: list[Any] = []
        stages = [stage for layer in range(len(adapter.layers)) for _, stage in plan.at(layer)]
        self._of_pixels = list(
            dict.fromkeys(s for x in stages for s in x.signals if isinstance(s, PictureSignal))
        )

    @property
    def latest(self) -> EncoderPass | None:
        """This thread's last forward, or that of any thread."""
        return self.current.latest or self._last

    # Life ------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hang what the method learns on the model, so that it moves and is saved with it."""
        if self.learned is None:
            return
        like = next(self.adapter.model.parameters())
        self.learned.to(device=like.device, dtype=like.dtype)
        self.learned.train(self.adapter.model.training)
        self.adapter.model.add_module(_LEARNED, self.learned)

    def remove(self) -> None:
        """Take the hooks off. Safe to call twice."""
        for handle in reversed(self.handles):
            handle.remove()
        self.handles.clear()
        modules: dict[str, Any] = self.adapter.model._modules
        if self.learned is not None and modules.get(_LEARNED) is self.learned:
            del modules[_LEARNED]

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_last": None,
            "_inputs": {},
            "_remembered": deque(maxlen=_REMEMBERED),
        }

    # What adapters ask -----------------------------------------------------------------------

    def sizes(self, count: int) -> Tensor | None:
        """Patches that each of ``count`` final tokens stands for; ``None``: one each."""
        latest = self.current.latest
        final = None if latest is None else latest.final
        if latest is None or final is None or final.count != count or latest.untouched:
            return None
        if final.policy is None and final.size is None and final.counts is not None:
            places = torch.arange(count, device=final.counts.device)
            return (places < final.counts[:, None]).to(torch.float32)
        return final.size if final.policy is None else final.policy

    def fresh(self) -> bool:
        """Whether sizes are of a forward since this was last asked, or no method has any."""
        latest = self.current.latest
        if not self.method.size_weighted:
            return True
        if latest is None or latest.asked:
            return False
        latest.asked = True
        return True

    def expand(self, layer: int, y: Tensor) -> Tensor:
        """Undo all reductions up to and in ``layer``."""
        latest = self.latest
        return y if latest is None else latest.expand(layer, y)

    def key_bias(self) -> Tensor | None:
        """The bias of the layer that runs."""
        active = self.current.active
        return None if active is None else active.key_bias()

    def places(self) -> Tensor | None:
        """Where the patches of the layer that runs come from."""
        active = self.current.active
        return None if active is None else active.state.origin

    def away(self, layer: int) -> bool:
        """Whether patches have left behind ``layer``, and come back later."""
        latest = self.latest
        if latest is None or latest.away is None:
            return False
        return any(s.num_slots < s.num_tokens for s in latest.until(layer))

    def policy(self) -> Tensor | None:
        """How much each patch counts as a key of the layer that runs."""
        active = self.current.active
        return None if active is None else active.state.policy

    # One forward -----------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the pixels became patches: a new pass."""
        pixels = args[0] if args else next(iter(kwargs.values()))
        grid, shapes = self.adapter.grid(pixels), self.adapter.shapes(args, kwargs)
        lengths = _lengths(shapes, grid)
        if lengths is None:
            pictures, groups = {s: s.of_batch(pixels) for s in self._of_pixels}, None
        else:
            pictures, groups = {}, padded.group(lengths, pixels, self._of_pixels)
        self.current.latest = self._last = EncoderPass(
            grid, pictures, shapes=shapes, lengths=lengths, groups=groups, back=self.plan.back
        )

    def pass_of(self, number: int, x: Tensor) -> EncoderPass:
        """The pass that a layer's input belongs to; a checkpoint runs layers of an earlier one."""
        run = self.current.latest
        learning = torch.is_grad_enabled() or self.adapter.model.training
        if learning and not torch.compiler.is_compiling():
            if run is None or run.final is not None or number in run.layers:
                again = self._inputs.get((number, x.data_ptr()))
                run = (None if again is None else again()) or run
            elif run is not None:
                self._remember(number, x, run)
        if run is None:
            raise ConfigError("A layer of the encoder ran before it was given pixels.")
        return run

    def _remember(self, number: int, x: Tensor, run: EncoderPass) -> None:
        if not self._remembered or self._remembered[-1] is not run:
            self._remembered.append(run)
            alive = {key: ref for key, ref in self._inputs.items() if ref() is not None}
            self._inputs = alive
        self._inputs[number, x.data_ptr()] = weakref.ref(run)

    # A stage ---------------------------------------------------------------------------------

    def record(self, number: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Keep what the stages of a layer want to see of its attention."""
        run = self.current.active
        if run is None:
            return
        prefix, has_cls = self.adapter.prefix, self.adapter.has_cls
        seen = EncoderSeen(prefix, has_cls, query=query, key=key, scale=scale, bias=run.state.bias)
        self._see(run, self.wanted(number, "attention"), seen)

    def compare(self, run: EncoderPass, number: int, x: Tensor) -> None:
        """Keep what the stages of a layer want to see of what enters it, and the one before."""
        adapter, before = self.adapter, run.entered[number - 1]
        seen = EncoderSeen(
            adapter.prefix, adapter.has_cls, bias=run.state.bias, entering=x, before=before
        )
        self._see(run, self.wanted(number, "entry"), seen)

    def wanted(self, number: int, use: EncoderUse) -> list[EncoderSignal]:
        """The signals of a use that the stages of a layer ask for."""
        signals = [s for _, stage in self.plan.at(number) for s in stage.signals]
        return [s for s in signals if isinstance(s, EncoderSignal) and s.uses == use]

    def _see(self, run: EncoderPass, wanted: list[EncoderSignal], seen: EncoderSeen) -> None:
        """Read signals, of a padded batch by groups."""
        if run.groups is not None and run.state.counts is not None:
            run.by_group = padded.read(run.groups, run.state.counts, wanted, seen)
            return
        for signal in wanted:
            run.signals[signal] = signal.read(seen)

    def decide(self, run: EncoderPass, order: int, stage: Stage, x: Tensor) -> None:
        """In training: let the method draw which patches later layers see; none leaves."""
        if self.learned is None:
            return
        if run.groups is not None:
            raise UnsupportedModel(
                f"{self.method.name} learns from batches of pictures of one size: this one is "
                f"padded. Train on such, or run it in eval mode (model.eval())."
            )
        patches, before = x[:, self.adapter.prefix :], run.state.policy
        there = patches.new_ones(patches.shape[:2]) if before is None else before
        context = Context(
            num_keep=step(stage, run.total, run.total),
            site=stage.site,
            stage=order,
            learned=self.learned[order],
        )
        decision = self.method.decide(VisualTokens(patches, there, _NOWHERE), context)
        run.decisions[order] = decision
        run.state = replace(run.state, policy=decision)

    def reduce(self, run: EncoderPass, number: int, order: int, stage: Stage, x: Tensor) -> Tensor:
        """Let a stage choose, and shorten the sequence ``[B, P + N, D]`` as it says."""
        prefix, method = self.adapter.prefix, self.method
        state = run.state
        patches = x[:, prefix:]
        size, placed = state.size, PatchPositions() in stage.signals
        tokens = VisualTokens(
            features=patches,
            size=torch.ones(patches.shape[:2], device=x.device) if size is None else size,
            pos=run.pos(run.entering(number, order)) if placed else _NOWHERE,
        )
        context = Context(
            site=stage.site,
            stage=order,
            signals={**run.pictures, **run.signals},
            original=run.total,
            layer=number,
            num_layers=len(self.adapter.layers),
            prefix=prefix,
            learned=None if self.learned is None else self.learned[order],
            carried=state.carried,
        )
        if run.groups is None or state.counts is None:
            selection = self._chosen(stage, tokens, context)
        else:
            ask = partial(self._chosen, stage)
            groups, signals, counts = run.groups, run.by_group, state.counts
            selection = padded.select(groups, signals, counts, tokens, context, ask)
        run.selections[number, order] = selection
        if (
            state.counts is not None
            and not selection.merges
            and selection.counts == (state.counts.tolist())
        ):  # all stay where they are: the padding too
            run.state = replace(state, carried=selection.carried)
            return x
        run.state = state.reduced(
            selection,
            prefix=prefix,
            placed=self.adapter.rotary,
            sized=method.size_weighted,
            biased=method.size_bias,
        )
        if stage.restores is not None:
            if selection.restoration is None:
                raise ConfigError(
                    f"{method.name} brings patches back that leave at {stage.site}, and its "
                    f"selection has no restoration. Return selection.returning(...)."
                )
            run.away = Away(selection, state, run.state, torch.is_grad_enabled())
        y = selection.reduce(x, prefix)
        return like(x, y) if self.adapter.by_layout(number) else y

    def _chosen(self, stage: Stage, tokens: VisualTokens, context: Context) -> Selection:
        """What a stage chooses from pictures of one number of tokens."""
        selection = choose(self.method, stage, tokens, context, self.observers)
        if selection.count is not None and len(set(selection.counts)) > 1:
            raise ConfigError(
                f"{self.method.name} keeps {selection.counts} patches of the pictures of one "
                f"batch; inside an encoder pictures of one size keep the same number. Give one "
                f"picture at a time."
            )
        return selection


def _lengths(shapes: list[tuple[int, int]] | None, grid: tuple[int, ...]) -> Tensor | None:
    """Patches of each picture; ``None``: none is padded."""
    counts = [height * width for height, width in shapes or ()]
    padding = any(count != math.prod(grid) for count in counts)
    return torch.tensor(counts) if padding else None
