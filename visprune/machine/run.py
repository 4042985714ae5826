# SPDX-License-Identifier: Apache-2.0
"""Attach a method to a model through hooks on its instances, and take it off again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import EncoderAdapter
from visprune.backbones.hf.cache import Owner
from visprune.backbones.vlm.base import VLMAdapter
from visprune.catalog import get_method
from visprune.core.budget import StepBudget
from visprune.core.method import PruningMethod
from visprune.core.trace import Trace
from visprune.cost.cost import Causal, Cost
from visprune.errors import ConfigError
from visprune.machine import price
from visprune.machine.check.trial import Trial
from visprune.machine.choose import Observer
from visprune.machine.decoder.hooks import DecoderHooks
from visprune.machine.encoder.layer import install
from visprune.machine.encoder.patches import PatchReduction
from visprune.machine.encoder.plan import step
from visprune.machine.encoder.price import selection_macs
from visprune.machine.encoder.reducer import EncoderReducer
from visprune.machine.encoder.state import EncoderPass
from visprune.machine.encoder.within_vlm import EncoderReduction
from visprune.machine.find import find_adapter, find_encoder, unwrap
from visprune.machine.plan import Plan, make_plan
from visprune.machine.threads import Gate


def prune(
    model: Any, method: str | PruningMethod | Sequence[str | PruningMethod], **params: Any
) -> Run:
    """Make a vision-language model or a vision transformer look at fewer tokens, from now on.

    Args:
        model: a transformers model of a family in :func:`list_models` (also wrapped by PEFT or
            dispatched by Accelerate), or a vision transformer of timm or open_clip. It is changed
            in place, by hooks on this instance only.
        method: a name of :func:`list_methods`, or a built method; or several, as a list or as
            ``"todre+fastv"``, whose stages run in order of depth (:mod:`visprune.core.chain`).
        **params: parameters of the method: ``num_keep`` (tokens of one image that stay) or
            ``keep_ratio``, and its own.

    Returns:
        A :class:`Run`: use it as a context manager, or call ``run.remove()``.

    Raises:
        ConfigError: unknown method or parameter, bad budget, or the model is already pruned.
        UnsupportedModel: no adapter, or the model lacks something that the method needs.

    The model is unchanged after any of these errors. Threads may call it at the same time: each
    call has its own state.

    Example:
        >>> run = visprune.prune(model, "todre", num_keep=64)  # doctest: +SKIP
        >>> model.generate(**inputs)  # doctest: +SKIP
        >>> run.remove()  # doctest: +SKIP
    """
    built = get_method(method, **params)
    encoder = find_encoder(model)
    return Run(encoder if encoder is not None else find_adapter(model), built)


class Run:
    """A method in force on a model: a vision-language model, or a vision transformer alone.

    Attributes:
        adapter: the model as the machine sees it.
        method: the method.
        plan: its stages, resolved.
        learned: the method's own modules, one per stage, or ``None``. While the run is in force
            they are a sub-module of the encoder, or of the model where they act behind it,
            ``visprune_learned``: its optimizer, device moves and ``state_dict`` include them.
        active: whether the run is in force.
    """

    def __init__(
        self,
        adapter: VLMAdapter | EncoderAdapter,
        method: PruningMethod,
        *,
        proved: bool | None = None,
    ) -> None:
        self.adapter, self.method = adapter, method
        self.plan: Plan = make_plan(method, adapter.spec)
        self.owner = Owner(method.name)
        self.observers: list[Observer] = []
        self.encoder: EncoderReduction | PatchReduction | None = None
        self._decoder: DecoderHooks | None = None
        self._gate = Gate()
        _refuse_second(adapter)
        if isinstance(adapter, VLMAdapter):
            if self.plan.encoder:
                self.encoder = EncoderReduction(
                    adapter, self._inside, self.plan.encoder, self.observers
                )
            elif self.plan.pixels is not None:
                stage, owner = self.plan.pixels
                self.encoder = PatchReduction(adapter, owner, stage, self.observers)
            self._reducer = None if self.encoder is None else self.encoder.reducer
            self._decoder = DecoderHooks(
                adapter, method, self.plan, self.owner, self.encoder, self.observers
            )
        else:
            total = math.prod(adapter.default_grid())
            self.plan.encoder.counts(total, len(adapter.layers))  # refuses what is too big
            self._reducer = EncoderReducer(
                adapter,
                self._inside,
                self.plan.encoder,
                self._inside.build_learned(adapter.spec),
                self.observers,
            )
        self.learned = None if self._reducer is None else self._reducer.learned
        behind = None if self._decoder is None else self._decoder.learned.modules
        if behind is not None and self.learned is not None:
            raise ConfigError(
                f"{method.name}: one member brings parameters to the image encoder and one to the "
                f"decoder; a run holds those of one. Leave one of them out."
            )
        self.learned = behind if self.learned is None else self.learned
        self._trial: Trial | None = None
        if isinstance(adapter, VLMAdapter) and not (adapter.proved if proved is None else proved):
            self._trial = Trial(adapter, self._take_off, self._put_on, self.remove)
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def _inside(self) -> PruningMethod:
        """The method, or the member of a chain, that acts inside the encoder."""
        return self.plan.inside or self.method

    # Life ------------------------------------------------------------------------------------

    def _install(self) -> None:
        _mark(self.adapter, self)
        if self._trial is not None and self._decoder is not None:
            self._decoder.unproved = self._trial.why
        self._put_on()
        if self._trial is not None:
            self._trial.install()

    def _put_on(self) -> None:
        """Put the hooks on; of a family that is tried, the second time for good."""
        trial = self._trial
        if trial is not None and trial.report is not None and self._decoder is not None:
            self._decoder.unproved = None
        if self._decoder is not None:
            self._decoder.install()
            if self.encoder is not None:
                self.encoder.install()
        elif self._reducer is not None:
            install(self._reducer)

    def _take_off(self) -> None:
        """Take all hooks off."""
        if self._trial is not None:
            self._trial.remove()
        if self.encoder is not None:
            self.encoder.remove()
        elif self._reducer is not None:
            self._reducer.remove()
        if self._decoder is not None:
            self._decoder.remove()

    def remove(self) -> None:
        """Take the method off: the model is bit for bit what it was. Safe to call twice.

        Waits for calls of other threads that are under way.
        """
        self._take_off()
        self.owner.active = False
        _unmark(self.adapter, self)

    @property
    def active(self) -> bool:
        """Whether the run is in force."""
        return self.owner.active

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "in force" if self.active else "removed"
        return f"Run({self.method}, {self.adapter.spec.family}, {state})"

    def observe(self, callback: Observer) -> Callable[[], None]:
        """Call ``callback(site, tokens, context, selection, seconds)`` after every choice.

        Images of one size are chosen from together; ``seconds`` are those of the method's rule.

        Returns:
            What ends it.
        """
        self.observers.append(callback)

        def end() -> None:
            if callback in self.observers:
                self.observers.remove(callback)

        return end

    # What happened ---------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """What happened in the last forward that held pictures: of this thread, or of any."""
        if self._decoder is not None:
            return self._decoder.trace
        reducer, layers = self._encoding(), len(self._alone().layers)
        latest = reducer.latest
        if latest is None or not latest.layers:
            return Trace(model="vit", prefix=self._alone().prefix)
        stages = self.plan.encoder
        sites = {(n, order): str(s.site) for n in range(layers) for order, s in stages.at(n)}
        trace = latest.trace(layers, self._alone().prefix, sites)
        trace.selection_per_row = [
            selection_macs(self._alone(), self._inside, stages, grid) for grid in latest.grids
        ]
        return trace

    @property
    def kept(self) -> list[Tensor]:
        """One int64 tensor per image: the token that each final slot stands for, in slot order.

        -1 where a slot is no token and no mean of tokens (EViT's fused one).

        Raises:
            ConfigError: nothing has run.
        """
        trace = self.trace
        if not trace.tokens_per_layer:
            raise _nothing_ran()
        found = []
        for image, kept in enumerate(trace.kept):
            whole = trace.whole(image)
            own = None if whole is None or self._inside.size_weighted else whole.own
            means = own is None or trace.model == "vlm"
            found.append(kept if means else torch.where(own[0] == 1.0, kept, -1))  # type: ignore[index]
        return found

    def expand(self, tokens: Tensor, layer: int | None = None, image: int | None = None) -> Tensor:
        """Give every token of the last forward the value of its slot.

        Args:
            tokens: of a vision transformer, ``[B, K, D]`` patch tokens (without prefix) as they
                left ``layer``; of one image of a vision-language model, ``[K, D]`` in slot order.
            layer: of a vision transformer, 0-based; ``None``: the last.
            image: of a vision-language model, the number of the image; ``None``: the first.

        Returns:
            ``[B, N, D]`` or ``[N, D]`` in raster order; zeros where a token was dropped.

        Raises:
            ConfigError: nothing has run.
        """
        if self._decoder is None:
            number = len(self._alone().layers) - 1 if layer is None else layer
            return self._encoding().expand(number, tokens)
        trace = self.trace
        if not trace.tokens_per_layer:
            raise _nothing_ran()
        whole = trace.whole(image or 0)
        return tokens if whole is None else whole.expand(tokens[None])[0]

    def cost(
        self,
        inputs: Mapping[str, Any] | Tensor | None = None,
        *,
        new_tokens: int = 0,
        causal: Causal = "ideal",
    ) -> Cost:
        """What a prompt, or pictures, cost under this run.

        Args:
            inputs: what the model takes; one forward is run with it (and becomes ``run.trace``):
                a prompt with pictures, or pixels ``[B, 3, H, W]`` of a vision transformer.
                ``None``: price the last forward (of a vision transformer that has not run, one
                picture of its own input size).
            new_tokens: of a vision-language model: tokens generated after the prompt.
            causal: ``"ideal"`` counts the visible half of causal attention, ``"dense"`` all of it.

        Returns:
            Multiply-adds by part of the whole batch; a vision transformer's, head included, are
            under ``vision``. See :mod:`visprune.machine.price`.

        Raises:
            ConfigError: nothing with a picture has run yet, or the run was removed.
        """
        if inputs is not None and not self.active:
            raise ConfigError("This run was removed; price inputs while it is in force.")
        if self._decoder is not None:
            if isinstance(inputs, Tensor):
                raise ConfigError("Give the whole prompt, as the processor returns it, not pixels.")
            return price.run_cost(self, inputs, new_tokens=new_tokens, causal=causal)
        if inputs is not None:
            with torch.no_grad():
                self._alone().run(inputs)
        return price.vit_cost(self._alone(), self._inside, self.plan.encoder, self._latest())

    # The training of a method that learns ------------------------------------------------------

    @property
    def decisions(self) -> list[Tensor]:
        """In training: the patches kept at each stage, ``[B, N]``, 1 or 0, with a gradient.

        Empty for methods that learn nothing, and after a forward in eval mode.
        """
        latest = self._latest()
        return [] if latest is None else [latest.decisions[n] for n in sorted(latest.decisions)]

    @property
    def ratios(self) -> list[float]:
        """What part of its patches a picture should keep after each stage inside an encoder."""
        adapter = self._encoding().adapter
        total = math.prod(adapter.default_grid())
        left, found = total, []
        for layer in range(len(adapter.layers)):
            for _, stage in self.plan.encoder.at(layer):
                left, budget = step(stage, left, total), stage.budget
                exact = None
                if isinstance(budget, StepBudget) and budget.of == "original":
                    exact = budget.keep_ratio
                found.append(left / total if exact is None else exact)
        return found

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along height and width (of clips, time first) of an encoder's own input size."""
        return self._alone().default_grid()

    def _encoding(self) -> EncoderReducer:
        if self._reducer is None:
            raise ConfigError(f"{self.method.name} does not act inside an encoder.")
        return self._reducer

    def _alone(self) -> EncoderAdapter:
        assert isinstance(self.adapter, EncoderAdapter), "a vision transformer alone"
        return self.adapter

    def _latest(self) -> EncoderPass | None:
        return None if self._reducer is None else self._reducer.latest


_RUN = "visprune_run"


def runs(model: Any) -> list[Run]:
    """The runs in force on a model, a copy of a pruned one included."""
    inner = unwrap(model)
    modules = inner.modules() if isinstance(inner, nn.Module) else ()
    found = [vars(module)[_RUN] for module in modules if _RUN in vars(module)]
    return [run for run in found if isinstance(run, Run)]


def remove(model: Any) -> None:
    """Take every run off a model, a copy of a pruned one too."""
    for run in runs(model):
        run.remove()


def _mark(adapter: VLMAdapter | EncoderAdapter, run: Run) -> None:
    vars(adapter.model)[_RUN] = run


def _unmark(adapter: VLMAdapter | EncoderAdapter, run: Run) -> None:
    if vars(adapter.model).get(_RUN) is run:
        del vars(adapter.model)[_RUN]


def _refuse_second(adapter: VLMAdapter | EncoderAdapter) -> None:
    inside = runs(adapter.model)
    if isinstance(adapter, VLMAdapter) and adapter.encoder is not None:
        inside += runs(adapter.encoder.model)
    if inside:
        raise ConfigError(
            f"The model is already pruned by {inside[0].method.name!r}. Two methods at once would "
            f"count each other's tokens; call run.remove() on the first, or visprune.remove(model) "
            f"(a copy of a pruned model is pruned too)."
        )


def _nothing_ran() -> ConfigError:
    return ConfigError("Nothing has run under this method yet; call the model first.")
