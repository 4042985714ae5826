# SPDX-License-Identifier: Apache-2.0
"""The hooks of one method around a vision-language model, its core and its decoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from visprune.backbones.encoders.base import Noticed
from visprune.backbones.hf.cache import CACHE_ARGUMENT, Owner, cache_of, check_cache
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout
from visprune.core.method import PruningMethod
from visprune.core.trace import Trace
from visprune.errors import UnsupportedModel
from visprune.machine.cache.evict import CacheEviction
from visprune.machine.choose import Observer
from visprune.machine.decoder.clips import ClipFrames
from visprune.machine.decoder.current import Current
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.learned import LearnedModules
from visprune.machine.decoder.outputs import OutputHooks
from visprune.machine.decoder.prompt import PromptEnd
from visprune.machine.decoder.reading import LayerReader, check_signals
from visprune.machine.decoder.stages import FORWARD, StageHooks
from visprune.machine.decoder.windows import makes_cache, opened
from visprune.machine.encoder.patches import PatchReduction
from visprune.machine.encoder.tap import EncoderTap, pictures_of
from visprune.machine.encoder.within_vlm import EncoderReduction
from visprune.machine.plan import Plan
from visprune.machine.threads import Gate


class DecoderHooks:
    """A method behind the encoder of one model.

    All hooks are methods of this object, so that a copy of the model has copies of them, which act
    on the copy alone.

    Args:
        adapter: the model family.
        method: the method.
        plan: its stages.
        owner: the run, as caches know it.
        encoder: what the method does before or inside the encoder, if anything.
        observers: whom to tell of every choice; read at each.

    Attributes:
        learned: what the method brings to its stages here.
        told: whom to tell of every call of the decoder that held pictures, behind its last layer.
        unproved: why pictures are not pruned yet: of a family that has to pass a check before.
    """

    unproved: str | None = None

    def __init__(
        self,
        adapter: VLMAdapter,
        method: PruningMethod,
        plan: Plan,
        owner: Owner,
        encoder: EncoderReduction | PatchReduction | None,
        observers: Sequence[Observer],
    ) -> None:
        self.adapter, self.method, self.plan, self.owner = adapter, method, plan, owner
        self.encoder, self.observers = encoder, observers
        self.learned = LearnedModules(adapter, plan)
        self.gate = Gate()
        self._current = Current()
        self.told: list[Callable[[Forward], None]] = []
        self._last: Trace | None = None
        self._handles: list[Any] = []
        self._outputs = OutputHooks(adapter.model, adapter.head)
        self._tap = EncoderTap(adapter, plan.encoder_signals, plan.picture_signals)
        if encoder is not None:
            self._tap.finish = encoder.mark
        self._in_layers = bool(plan.decoder_stages) or plan.cache is not None
        kernel = str(adapter.text_config._attn_implementation)
        self._flash = kernel.startswith("flash")
        if any(act.weighs for act in plan.acts) and kernel not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"{method.name} weighs merged tokens by size in decoder attention, and "
                f"{kernel} takes no bias per key. Use "
                f"model.set_attn_implementation('sdpa'), or pass prop_attn=False."
            )
        self._warned: set[str] = set()
        everything = method.asks_the_last_token
        self._prompt = PromptEnd(adapter, plan, method.name, everything, self._warn)
        self._clips = ClipFrames(adapter)
        self._reader = LayerReader(adapter, plan, observers, self._current.under_way)
        self._stages = StageHooks(
            adapter, plan, observers, self.learned, self._reader, self._current
        )
        self._eviction: CacheEviction | None = None
        if plan.cache is not None:
            number, stage = plan.cache
            self._eviction = CacheEviction(
                adapter,
                method.name,
                stage,
                plan.acts[number].member is not None,
                observers,
                self._current.under_way,
                plan.positions == "compact",
                self.learned.of(plan.acts[number]),
            )

    @property
    def trace(self) -> Trace:
        """What happened in this thread's last forward that held pictures, or in any thread's."""
        return self._current.trace or self._last or Trace()

    @trace.setter
    def trace(self, value: Trace) -> None:
        self._current.trace = self._last = value

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    # Life ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks on."""
        adapter, add = self.adapter, self._handles.append
        add(adapter.model.register_forward_pre_hook(self._told, with_kwargs=True))
        add(adapter.model.register_forward_hook(self._over, always_call=True))
        add(adapter.core.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(adapter.language_model.register_forward_pre_hook(self._enter, with_kwargs=True))
        add(adapter.language_model.register_forward_hook(self._leave, with_kwargs=True))
        add(adapter.core.register_forward_hook(self._end, always_call=True))  # may be one module
        everywhere = adapter.adds_later or adapter.windowed or bool(adapter.recurrent)
        if self._in_layers or self._flash or everywhere or self.plan.ahead:
            self._handles += self._stages.install()
        self._handles += self._reader.install() + self._outputs.install() + adapter.guards()
        if self._eviction is not None:
            self._handles += self._eviction.install()
        self._tap.install()
        add(Noticed(adapter.core))
        add(Noticed(adapter.language_model))
        add(self._prompt.install())
        add(self._clips.install())
        self.learned.attach()

    def remove(self) -> None:
        """Take them off, once no other thread is in a call."""
        with self.gate.closed():
            for handle in reversed(self._handles):
                handle.remove()
            self._handles.clear()
            self._outputs.remove()
            self._tap.remove()
            self.learned.detach()

    @torch.compiler.disable
    def _told(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: what it is told of the end of the prompt."""
        self.gate.enter()
        if torch.compiler.is_exporting():
            raise UnsupportedModel(
                f"torch.export cannot follow {self.method.name}: where the pictures stand, and how "
                f"many tokens stay, depends on the values of a prompt. Call run.remove() before "
                f"exporting; a pruned image encoder alone exports (visprune.prune on it)."
            )
        kwargs = dict(kwargs)
        self._prompt.model_begins(kwargs)
        self._clips.begins(kwargs)
        return args, kwargs

    @torch.compiler.disable
    def _over(self, model: nn.Module, args: Any, output: Any) -> None:
        """After the model, head and loss included; also after an error."""
        self._prompt.model_ends()
        self._clips.ends()
        self.gate.leave()

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, UserWarning, stacklevel=2)

    # Hooks -----------------------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before pictures are encoded: refuse what cannot work."""
        self.gate.enter()
        self._prompt.core_begins(kwargs)
        self._clips.begins(kwargs)
        call = self.adapter.bind(args, kwargs)
        check_cache(cache_of(call), windows=self.adapter.windowed)
        self._tap.begin(call)
        self._current.call = call
        return args, kwargs

    @torch.compiler.disable
    def _end(self, core: nn.Module, args: Any, output: Any) -> None:
        """After the core, also after an error."""
        current = self._current
        current.call = current.forward = None
        self._clips.ends()
        self._tap.end()
        self.gate.leave()

    def _layouts(self) -> list[ImageLayout]:
        """Find the pictures of the call that is under way."""
        call, self._current.call = self._current.call, None
        layouts: list[ImageLayout] = []
        if call is not None:
            pictures = self._tap.pictures()
            for kind, given in (call.get("mm_encoder_outputs") or {}).items():
                if kind not in pictures and given is not None:
                    pictures[kind] = pictures_of(given, kind)
            if not pictures:
                layouts = self._tap.found(call)
                if not layouts and self._tap.unplaced(call):
                    self._warn(
                        "merged",
                        "Pictures were encoded by hand, and the call that followed was given "
                        "inputs_embeds in which their features are not found: nothing is pruned "
                        "there. Pass the features unchanged, or input_ids and pixels.",
                    )
            layouts += self.adapter.layouts(call, pictures)
            layouts = self._clips.joined(layouts)
        if layouts and self.unproved is not None:
            raise UnsupportedModel(self.unproved)
        for layout in layouts:
            picture = layout.picture
            self.plan.check_count(len(picture.pos), picture.frames, self.adapter.spec)
            check_signals(self.plan, self.method.name, layout)
        return layouts

    def _open(self, kwargs: dict[str, Any]) -> Forward:
        call = self._current.call or {}
        layouts = self._layouts()
        masks, kwargs = opened(self.adapter, call, kwargs, layouts)
        fwd = Forward(
            self.adapter,
            self.owner,
            layouts,
            kwargs,
            masks=masks,
            compact=self.plan.positions == "compact",
            prompt=self._prompt.columns(),
        )
        fwd.ids = call.get("input_ids")
        self._prompt.check(fwd)
        self._current.forward = fwd
        return fwd

    @torch.compiler.disable
    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: projector stages, and the arguments of the shorter sequence."""
        if self.adapter.merges_inside or kwargs.get("inputs_embeds") is None:
            args, kwargs = (), self.adapter.embedded(args, kwargs, self._tap.note)
        check_cache(cache_of(kwargs), windows=self.adapter.windowed)
        fwd = self._open(kwargs)
        if self.adapter.windowed and fwd.masks is None:
            return args, kwargs  # nothing was dropped here or before
        if fwd.masks is not None:
            kwargs[CACHE_ARGUMENT] = fwd.cache
        if self._eviction is not None:
            self._eviction.check(fwd, fwd.cache is not None or makes_cache(self.adapter, kwargs))
            self._eviction.expect(fwd)
        hidden = kwargs["inputs_embeds"]
        in_layers = self._flash or (self._in_layers and (bool(fwd.images) or fwd.uneven))
        if fwd.images:
            # Features that the decoder would add between its layers, by the places that its tokens
            # had; they go the way of their tokens.
            kwargs, fwd.later = self.adapter.later_features(kwargs)
            in_layers = in_layers or bool(fwd.later)
        in_layers = in_layers or bool(self._stages.thins is not None and fwd.answers)
        # A 4-D mask says nothing to recurrent layers.
        recurrent = self.adapter.recurrent and fwd.mask4d is not None
        in_layers = in_layers or fwd.masks is not None or bool(recurrent and fwd.images)
        if fwd.images:
            if self.encoder is not None:
                step = self.encoder.start(fwd)
                hidden = step(hidden)
                fwd.later = {layer: step(one) for layer, one in fwd.later.items()}
            hidden = self._stages.at_projector(fwd, hidden, kwargs)
            fwd.start_layers()
            self._reader.inputs(fwd, hidden)
            if not in_layers:
                for number in range(len(self.adapter.layers)):
                    fwd.enter(number, [], {})
        new = fwd.arguments(hidden, kwargs)
        if in_layers:
            new[FORWARD] = fwd
        if fwd.images and fwd.pad_side == "right" and "logits_to_keep" in new:
            new["logits_to_keep"] = 0  # the last slots of the rows are not their last tokens
        return args, new

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After the decoder: give the cache its ledgers and the output its length back."""
        fwd, self._current.forward = self._current.forward, None
        if fwd is None:
            return None
        for told in self.told if fwd.images else ():
            told(fwd)
        trace = fwd.close(cache_of(output))
        if fwd.stored is not None:
            self.trace.unstored += int((~fwd.stored[1]).sum())
        if self._eviction is not None:
            self._eviction.finish(fwd, cache_of(output))
        if trace is None:
            if fwd.trace.cache is not None and self.trace.cache is not None:
                self.trace.cache.later.append(fwd.trace.cache)
            self._outputs.forget()
            return output
        self.trace = trace
        self._outputs.lengthen(fwd, output, trace)
        return output
