# SPDX-License-Identifier: Apache-2.0
"""What the layers of an image encoder run in place of their forward while tokens leave."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import Instead, Layer, Noticed, refuse_scripting
from visprune.machine.encoder.reducer import EncoderReducer
from visprune.machine.encoder.state import EncoderPass


def install(reducer: EncoderReducer) -> None:
    """Put the hooks of a reduction on its encoder; ``reducer.remove()`` takes them off."""
    adapter, model = reducer.adapter, reducer.adapter.model
    add = reducer.handles.append
    add(adapter.embed.register_forward_hook(reducer.begin, with_kwargs=True))
    for number in range(len(adapter.layers)):
        reducer.handles += ReducedLayer(reducer, number).install()
    reducer.handles += adapter.overrides(reducer)
    add(Instead(model, "__prepare_scriptable__", partial(refuse_scripting, model)))
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            add(Noticed(module))
    reducer.attach()


class ReducedLayer:
    """What one layer runs in place of its forward.

    The layer's own forward is called within, so that all that it holds stays. Hooks on the layer
    see what goes in and what comes out, as ever; a checkpoint holds the whole of it, and its input
    is what gradients go to.

    Args:
        reducer: whose layer.
        number: which.
    """

    def __init__(self, reducer: EncoderReducer, number: int) -> None:
        self.reducer, self.number = reducer, number
        self.layer: Layer = reducer.adapter.layers[number]
        self._steady = number in reducer.plan.steady
        self._inside = self._steady or number in reducer.plan.inside
        self._before: Any = None
        plan, last = reducer.plan, len(reducer.adapter.layers) - 1
        busy = (plan.entry, plan.inside, plan.steady, plan.compared, (plan.back, 0, last))
        # Between its first layer and its last, one without stages has nothing to do but to count.
        self._counts = not any(number in part for part in busy) and number + 1 not in plan.compared
        self._checkpoints = hasattr(type(self.layer.block), "gradient_checkpointing")

    def install(self) -> list[Any]:
        """Put it in place; returns what takes it off."""
        reducer, layer, number = self.reducer, self.layer, self.number
        self._before = vars(layer.block).get("forward")  # Accelerate's, of a layer it moves
        handles: list[Any] = [Instead(layer.block, "forward", self.forward)]
        signals = reducer.wanted(number, "attention")
        if signals:
            every, record = any(s.every for s in signals), partial(reducer.record, number)
            handles += reducer.adapter.watch(number, record, every=every)
        if reducer.learned is not None and number >= min(reducer.plan.entry, default=number + 1):
            handles += reducer.adapter.weigh_keys(number, reducer.policy)
        if self._inside and layer.entry is not None and layer.branch is not None:
            # Before the hooks of a probe, which must see what the layer really reads.
            handles.append(layer.entry.register_forward_pre_hook(self._read, prepend=True))
            handles.append(layer.branch.register_forward_hook(self._between))
            if layer.gain is not None:
                handles.append(Instead(layer.block, layer.gain, 1.0))
        return handles

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer, with its stages."""
        if self._counts and len(args) == 1 and not kwargs and not torch.is_grad_enabled():
            passed = self.reducer.current.latest
            if passed is not None and passed.plain:
                passed.attended[self.number] = passed.mapped[self.number] = passed.state.count
                return self._original(*args)
        if not args:
            args = (kwargs.pop("hidden_states"),)
        block: Any = self.layer.block
        run = self.reducer.pass_of(self.number, args[0])
        if self._checkpoints and block.training and torch.is_grad_enabled() and _on(block):
            return block._gradient_checkpointing_func(partial(self._run, run, **kwargs), *args)
        return self._run(run, *args, **kwargs)

    def _run(self, run: EncoderPass, *args: Any, **kwargs: Any) -> Any:
        current, reducer = self.reducer.current, self.reducer
        before, current.active = current.active, run
        try:
            x = self._enter(run, args[0])
            adapter = reducer.adapter
            args = (x, *args[1:])
            masks: dict[str, Any] = {}
            if run.lengths is not None:
                args, kwargs, masks = adapter.take_mask(args, kwargs, run.lengths)
            args, kwargs = adapter.inputs(args, kwargs, run.key_bias(), run.state.origin)
            kwargs = {**kwargs, **masks} if run.untouched else kwargs
            if self._inside and self.layer.entry is not None:
                run.stream, args = args[0], (_placeholder(x), *args[1:])
            output = self._original(*args, **kwargs)
            return self._leave(run, output)
        finally:
            run.stream, current.active = None, before

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; the checkpoint that transformers has in it is outside of us."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        block: Any = self.layer.block
        own: Any = type(block).forward
        if self._checkpoints and _on(block):
            own = own.__wrapped__
        return own(block, *args, **kwargs)

    def _enter(self, run: EncoderPass, x: Tensor) -> Tensor:
        """On entering: the stages there, and what belongs to the tokens that are left."""
        reducer, number = self.reducer, self.number
        run.enter(number, x, reducer.adapter.prefix)
        if number in reducer.plan.compared:
            reducer.compare(run, number, x)
        for order, stage in reducer.plan.entry.get(number, ()):
            if reducer.learned is not None and reducer.adapter.model.training:
                reducer.decide(run, order, stage, x)
            else:
                x = reducer.reduce(run, number, order, stage, x)
        if self._steady:
            x = run.bring_back(x, reducer.adapter.prefix)
        if number + 1 in reducer.plan.compared:
            run.entered[number] = x.detach()
        run.attended[number] = run.mapped[number] = run.alive()
        return x

    def _read(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The module that reads the layer's input gets the real one."""
        run = self.reducer.current.active
        if run is None or run.stream is None:
            return None
        return (run.stream, *args[1:])

    def _between(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the attention branch: add it to the stream, and let tokens leave."""
        run, number = self.reducer.current.active, self.number
        if run is None or run.stream is None:
            return None
        branch, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        x, run.stream = self.layer.added(run.stream, branch), None
        for order, stage in self.reducer.plan.inside.get(number, ()):
            x = self.reducer.reduce(run, number, order, stage, x)
        if self._steady:
            x = run.take_away(x, self.reducer.adapter.prefix)
        run.mapped[number] = run.alive()
        return x if rest is None else (x, *rest)

    def _leave(self, run: EncoderPass, output: Any) -> Any:
        """At the end: the stages of a layer whose parts run side by side, and who comes back."""
        if isinstance(output, tuple):
            return (self._leave(run, output[0]), *output[1:])
        reducer, number = self.reducer, self.number
        if self.layer.entry is None:
            for order, stage in reducer.plan.inside.get(number, ()):
                output = reducer.reduce(run, number, order, stage, output)
            if self._steady:
                output = run.take_away(output, reducer.adapter.prefix)
        if number == reducer.plan.back:
            output = run.bring_back(output, reducer.adapter.prefix)
        if number == len(reducer.adapter.layers) - 1:
            run.final = run.state
            if reducer.adapter.gives_whole:
                output = run.expanded(number, output, reducer.adapter.prefix)
        return output


class _Nothing:
    """What a layer adds to the reduced branch in place of its input: nothing, of its shape."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __add__(self, other: Tensor) -> Tensor:
        return other

    __radd__ = __add__


def _placeholder(x: Tensor) -> Any:
    """In place of a layer's input: nothing, or zeros where a graph is made."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x.new_zeros(1, 1, 1)
    return _Nothing(x.shape)


def _on(block: Any) -> bool:
    """Whether a layer's own ``forward`` is a checkpoint around the real one (transformers 5.24)."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    code = getattr(type(block).forward, "__code__", None)
    return code is not None and code.co_name == "forward_with_checkpointing"
