# SPDX-License-Identifier: Apache-2.0
"""Reduce tokens inside one image encoder, through hooks on its layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.encoders.base import Layer, Noticed, TowerAdapter
from visprune.backbones.vlm.base import fingerprint
from visprune.core.budget import Stage
from visprune.core.method import Context, PruningMethod
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError
from visprune.machine.encoder.plan import TowerPlan, step
from visprune.machine.encoder.state import TowerPass

_MARK = "_visprune_tower"
_NOWHERE = torch.empty(0, 0, 3, dtype=torch.int64)
_LEARNED = "visprune_learned"


class TowerReducer:
    """The hooks of one method on one encoder.

    All hooks are methods of objects that the model's hooks refer to, so a copy of the model
    (``copy.deepcopy``, an average of weights, a pickle) is pruned by itself, and has not run yet.

    Args:
        adapter: the encoder.
        method: the method.
        plan: its stages there.
        learned: modules of its stages, of a method that has parameters.
    """

    def __init__(
        self,
        adapter: TowerAdapter,
        method: PruningMethod,
        plan: TowerPlan,
        learned: nn.ModuleList | None = None,
    ) -> None:
        self.adapter, self.method, self.plan, self.learned = adapter, method, plan, learned
        self.latest: TowerPass | None = None
        self._active: TowerPass | None = None
        self._handles: list[Any] = []
        stages = [pair for layer in range(len(adapter.layers)) for pair in plan.at(layer)]
        self._fingerprints = any(stage.needs.fingerprint for _, stage in stages)

    # Life ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks on.

        Raises:
            ConfigError: another method reduces this encoder.
        """
        for hook in self.adapter.embed._forward_hooks.values():
            other = getattr(getattr(hook, "__self__", None), "method", None)
            if isinstance(other, PruningMethod):
                raise ConfigError(
                    f"The model is already pruned by {other.name!r}. Two methods at once would "
                    f"count each other's tokens; call run.remove() on the first. (A copy of a "
                    f"pruned model is pruned too: copy.deepcopy(run) is the run of another copy, "
                    f"its adapter.model.)"
                )
        add = self._handles.append
        add(self.adapter.embed.register_forward_hook(self._begin, with_kwargs=True))
        for number, layer in enumerate(self.adapter.layers):
            self._install_layer(number, layer)
        self._handles += self.adapter.overrides(self)
        for module in self.adapter.model.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                add(Noticed(module))
        self._attach()

    def _attach(self) -> None:
        if self.learned is None:
            return
        like = next(self.adapter.model.parameters())
        self.learned.to(device=like.device, dtype=like.dtype)
        self.learned.train(self.adapter.model.training)
        self.adapter.model.add_module(_LEARNED, self.learned)

    def _install_layer(self, number: int, layer: Layer) -> None:
        stages, add = self.plan.at(number), self._handles.append
        if any(s.needs.vision_keys or s.needs.cls_attention for _, s in stages):
            self._handles += self.adapter.watch(number, partial(self._record, number))
        if self.learned is not None and number >= min(self.plan.entry, default=number + 1):
            self._handles += self.adapter.weigh_keys(number, self._policy)
        enter = partial(self._enter, number)
        add(layer.block.register_forward_pre_hook(enter, with_kwargs=True))
        if number in self.plan.inside and layer.entry is not None and layer.branch is not None:
            # Before the hooks of a probe, which must see what the layer really reads.
            add(layer.entry.register_forward_pre_hook(self._read, prepend=True))
            add(layer.branch.register_forward_hook(partial(self._between, number)))
        add(layer.block.register_forward_hook(partial(self._leave, number)))

    def remove(self) -> None:
        """Take the hooks off. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        modules: dict[str, Any] = self.adapter.model._modules
        if self.learned is not None and modules.get(_LEARNED) is self.learned:
            del modules[_LEARNED]
        self._active = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "latest": None, "_active": None}

    # What adapters ask -----------------------------------------------------------------------

    def sizes(self, count: int) -> Tensor | None:
        """Patches that each of ``count`` final tokens stands for; ``None``: one each."""
        final = None if self.latest is None else self.latest.final
        if final is None or final.count != count:
            return None
        return final.size if final.policy is None else final.policy

    def expand(self, layer: int, y: Tensor) -> Tensor:
        """Undo all reductions up to and in ``layer``."""
        return y if self.latest is None else self.latest.expand(layer, y)

    def key_bias(self) -> Tensor | None:
        """The bias of the layer that runs."""
        return None if self._active is None else self._active.state.bias

    # Hooks -----------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the pixels became patches: a new pass."""
        pixels = args[0] if args else next(iter(kwargs.values()))
        prints = tuple(fingerprint(picture) for picture in pixels) if self._fingerprints else ()
        self.latest = TowerPass(self.adapter.grid(pixels), prints)

    def _enter(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a layer: its stages on entry, and what belongs to the tokens that are left."""
        if not args:
            kwargs = dict(kwargs)
            args = (kwargs.pop("hidden_states"),)
        x = args[0]
        run = self._pass_of(x)
        run.enter(number, x, self.adapter.prefix)
        for order, stage in self.plan.entry.get(number, ()):
            if self.learned is not None and self.adapter.model.training:
                self._decide(number, order, stage, x)
            else:
                x = self._reduce(number, order, stage, x)
        run.attended[number] = run.mapped[number] = run.state.count
        args, kwargs = self.adapter.inputs((x, *args[1:]), kwargs, run.state.bias, run.state.origin)
        if number in self.plan.inside and self.adapter.layers[number].entry is not None:
            run.stream = args[0]
            args = (x.new_zeros(1, 1, 1), *args[1:])
        return args, kwargs

    def _pass_of(self, x: Tensor) -> TowerPass:
        """The pass that a layer's input belongs to; a checkpoint runs layers of an earlier one."""
        run = self.latest
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            run = getattr(x, _MARK, run)
            setattr(x, _MARK, run)
        if run is None:
            raise ConfigError("A layer of the encoder ran before it was given pixels.")
        self._active = run
        return run

    def _read(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The module that reads the layer's input gets the real one."""
        run = self._active
        if run is None or run.stream is None:
            return None
        return (run.stream, *args[1:])

    def _between(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        """After the attention branch: add it to the stream, and let tokens leave."""
        run = self._active
        if run is None or run.stream is None:
            return None
        branch, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        x, run.stream = run.stream + branch, None
        for order, stage in self.plan.inside[number]:
            x = self._reduce(number, order, stage, x)
        run.mapped[number] = run.state.count
        return x if rest is None else (x, *rest)

    def _leave(self, number: int, block: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After a layer whose parts run side by side: let tokens leave there."""
        run, changed = self._active, False
        if run is None:
            return None
        if self.adapter.layers[number].entry is None:
            for order, stage in self.plan.inside.get(number, ()):
                output, changed = self._reduce(number, order, stage, output), True
        if number == len(self.adapter.layers) - 1:
            run.final = run.state
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            setattr(output, _MARK, run)
        return output if changed else None

    # A stage ---------------------------------------------------------------------------------

    def _record(self, number: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Keep what the stages of a layer want to see of its attention."""
        run, prefix = self._active, self.adapter.prefix
        if run is None:
            return
        needs = [stage.needs for _, stage in self.plan.at(number)]
        if any(need.vision_keys for need in needs):
            run.keys = key.detach()[:, :, prefix:].mean(1)
        if any(need.cls_attention for need in needs) and self.adapter.has_cls:
            bias = run.state.bias
            mask = None if bias is None else bias[:, None, None].to(key.dtype)
            rows = ops.attention_rows(query[:, :, :1], key, scale=scale, mask=mask)
            run.cls_attention = rows[:, :, 0, prefix:]

    def _policy(self) -> Tensor | None:
        """How much each patch counts as a key of the layer that runs."""
        return None if self._active is None else self._active.state.policy

    def _decide(self, number: int, order: int, stage: Stage, x: Tensor) -> None:
        """In training: let the method draw which patches later layers see; none leaves."""
        run = self._active
        if run is None or self.learned is None:
            return
        patches, before = x[:, self.adapter.prefix :], run.state.policy
        there = patches.new_ones(patches.shape[:2]) if before is None else before
        ctx = Context(
            num_keep=step(stage, run.total, run.total), stage=order, learned=self.learned[order]
        )
        decision = self.method.decide(VisualTokens(patches, there, _NOWHERE), ctx)
        run.decisions[order] = decision
        run.state = replace(run.state, policy=decision)

    def _reduce(self, number: int, order: int, stage: Stage, x: Tensor) -> Tensor:
        """Let a stage choose, and shorten the sequence ``[B, P + N, D]`` as it says."""
        run, prefix, method = self._active, self.adapter.prefix, self.method
        if run is None:
            return x
        state = run.state
        patches = x[:, prefix:]
        size = state.size
        tokens = VisualTokens(
            features=patches,
            size=torch.ones(patches.shape[:2], device=x.device) if size is None else size,
            pos=run.pos(run.composed(number).index) if stage.needs.positions else _NOWHERE,
        )
        ctx = Context(
            num_keep=step(stage, state.count, run.total),
            stage=order,
            cls_attention=run.cls_attention if stage.needs.cls_attention else None,
            vision_keys=run.keys if stage.needs.vision_keys else None,
            fingerprints=run.fingerprints,
            layer=number,
            num_layers=len(self.adapter.layers),
            prefix=prefix,
            learned=None if self.learned is None else self.learned[order],
        )
        selection = method.select(tokens, ctx)
        run.selections[number, order] = selection
        run.state = state.reduced(
            selection,
            prefix=prefix,
            placed=self.adapter.rotary,
            sized=method.size_weighted,
            biased=method.size_bias,
        )
        y = selection.reduce_behind(x, prefix)
        # A model without prefix tokens carries its stream feature by feature in memory. A layer
        # that multiplies it right away, without a norm before, gets the other layout's last bits.
        layer = self.adapter.layers[number]
        if layer.entry is layer.attention and not x.is_contiguous():
            y = y.transpose(1, 2).contiguous().transpose(1, 2)
        return y
