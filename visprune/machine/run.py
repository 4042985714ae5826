# SPDX-License-Identifier: Apache-2.0
"""Attach a method to a model through hooks on its instances, and take it off again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from visprune.backbones.hf.cache import Owner, cache_of, check_cache
from visprune.backbones.hf.probe import capture, watch
from visprune.backbones.vlm.base import ImageLayout, VLMAdapter
from visprune.catalog import get_method
from visprune.core.budget import Budget, Stage
from visprune.core.method import PruningMethod
from visprune.core.trace import Trace
from visprune.cost.cost import Causal, Cost
from visprune.errors import ConfigError
from visprune.machine.decoder.attention import decoder_attention, own_attention
from visprune.machine.decoder.forward import Forward
from visprune.machine.decoder.outputs import OutputHooks
from visprune.machine.decoder.shorten import Step, run_selection, run_withdrawal
from visprune.machine.encoder.tap import EncoderTap, pictures_of
from visprune.machine.encoder.within_vlm import EncoderReduction
from visprune.machine.find import find_adapter, find_tower
from visprune.machine.plan import Plan, make_plan
from visprune.machine.vit_run import ViTRun

_FORWARD = "visprune_forward"


def prune(model: Any, method: str | PruningMethod, **params: Any) -> Any:
    """Make a vision-language model or a vision transformer look at fewer tokens, from now on.

    Args:
        model: a transformers model of a family in :func:`list_models` (also wrapped by PEFT or
            dispatched by Accelerate), or a vision transformer of timm or open_clip. It is changed
            in place, by hooks on this instance only.
        method: a name of :func:`list_methods`, or a built method.
        **params: parameters of the method: ``num_keep`` (tokens of one image that stay) or
            ``keep_ratio``, and its own.

    Returns:
        A :class:`Run` (:class:`visprune.machine.vit_run.ViTRun` on a vision transformer): use it
        as a context manager, or call ``run.remove()``.

    Raises:
        ConfigError: unknown method or parameter, bad budget, or the model is already pruned.
        UnsupportedModel: no adapter, or the model lacks something that the method needs.

    The model is unchanged after any of these errors.

    Example:
        >>> run = visprune.prune(model, "todre", num_keep=64)  # doctest: +SKIP
        >>> model.generate(**inputs)  # doctest: +SKIP
        >>> run.remove()  # doctest: +SKIP
    """
    built = get_method(method, **params)
    tower = find_tower(model)
    return ViTRun(tower, built) if tower is not None else Run(find_adapter(model), built)


class Run:
    """A method in force on a model.

    Attributes:
        method: the method.
        trace: what happened in the last forward that held visual tokens.
    """

    def __init__(self, adapter: VLMAdapter, method: PruningMethod) -> None:
        self.adapter, self.method = adapter, method
        self.trace = Trace()
        for hook in adapter.language_model._forward_pre_hooks.values():
            other = getattr(getattr(hook, "__self__", None), "method", None)
            if isinstance(other, PruningMethod):
                raise ConfigError(
                    f"The model is already pruned by {other.name!r}. Two methods at once would "
                    f"count each other's tokens; call run.remove() on the first."
                )
        self.plan: Plan = make_plan(method, adapter.spec)
        self.owner = Owner(method.name)
        self._call: dict[str, Any] | None = None
        self._current: Forward | None = None
        self._handles: list[Any] = []
        self._outputs = OutputHooks(adapter.model, adapter.head)
        self._tap = EncoderTap(
            adapter,
            tuple(self.plan.cls_layers),
            keys=self.plan.vision_keys,
            fingerprints=self.plan.fingerprint,
        )
        vision = self.plan.vision
        self.encoder = EncoderReduction(adapter, method, vision) if vision else None
        if self.encoder is not None:
            self._tap.finish = self.encoder.mark
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    # Life ------------------------------------------------------------------------------------

    def _install(self) -> None:
        adapter, plan = self.adapter, self.plan
        add = self._handles.append
        add(adapter.core.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(adapter.language_model.register_forward_pre_hook(self._enter, with_kwargs=True))
        add(adapter.language_model.register_forward_hook(self._leave, with_kwargs=True))
        flash = str(adapter.text_config._attn_implementation).startswith("flash")
        self._in_layers = bool(plan.decoder_stages) or flash
        if self._in_layers:
            for number, layer in enumerate(adapter.layers):
                hook = partial(self._layer, number)
                add(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for number, stage in plan.previous_attention.items():
            wanted = partial(self._watch_layer, number, stage)
            self._handles += watch(adapter.layers[number].self_attn, wanted)
        self._handles += self._outputs.install()
        self._tap.install()
        if self.encoder is not None:
            self.encoder.install()

    def remove(self) -> None:
        """Take the method off: the model is bit for bit what it was. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.remove()
        self._tap.remove()
        if self.encoder is not None:
            self.encoder.remove()
        self.owner.active = False
        self._call = self._current = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "in force" if self.owner.active else "removed"
        return f"Run({self.method}, {self.adapter.spec.family}, {state})"

    def cost(self, inputs: Any = None, *, new_tokens: int = 0, causal: Causal = "ideal") -> Cost:
        """What a prompt costs under this run; see :func:`visprune.machine.price.run_cost`."""
        from visprune.machine.price import run_cost

        return run_cost(self, inputs, new_tokens=new_tokens, causal=causal)

    # Hooks -----------------------------------------------------------------------------------

    def _begin(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before pictures are encoded: refuse what cannot work."""
        call = self.adapter.bind(args, kwargs)
        check_cache(cache_of(call))
        self._tap.latest = {}
        self._call = call

    def _open(self) -> Forward:
        """Find the pictures of the call that is under way."""
        call, self._call = self._call, None
        layouts: list[ImageLayout] = []
        if call is not None:
            pictures = dict(self._tap.latest)
            for kind, given in (call.get("mm_encoder_outputs") or {}).items():
                if kind not in pictures and given is not None:
                    pictures[kind] = pictures_of(given, kind)
            layouts = self.adapter.layouts(call, pictures)
        for layout in layouts:
            for budget in self.plan.budgets:
                budget.resolve(len(layout.picture.pos), strict=self.method.strict)
            self._check_signals(layout)
        return Forward(self.adapter, self.owner, layouts, compact=self.plan.positions == "compact")

    def _check_signals(self, layout: ImageLayout) -> None:
        picture = layout.picture
        missing = [x for x in self.plan.cls_layers if x not in picture.cls_attention]
        if missing or (self.plan.vision_keys and picture.vision_keys is None):
            raise ConfigError(
                f"{self.method.name} reads attention of the vision encoder, which these features "
                f"were encoded without. Encode them with visprune.encode_images, or inside the run."
            )

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: projector stages, and the arguments of the shorter sequence."""
        fwd = self._current = self._open()
        if kwargs.get("inputs_embeds") is None:
            ids = kwargs.pop("input_ids", None)
            ids = args[0] if ids is None else ids
            args, kwargs = (), {**kwargs, "inputs_embeds": module.get_input_embeddings()(ids)}
        check_cache(cache_of(kwargs))
        fwd.open(kwargs)
        hidden = kwargs["inputs_embeds"]
        if fwd.images:
            if self.encoder is not None:
                hidden = self.encoder.start(fwd)(hidden)
            for number, stage in self.plan.projector_stages:
                hidden = self._run(stage, number, fwd, hidden)(hidden)
            fwd.start_layers()
            if not self._in_layers:
                for number in range(len(self.adapter.layers)):
                    fwd.enter(number, [], {})
        new = dict(kwargs, inputs_embeds=hidden, attention_mask=fwd.model_mask())
        ledger = fwd.ledger(0)
        if fwd.images or (fwd.compact and ledger is not None):
            new["position_ids"] = fwd.table_positions(fwd.table, 0)
        if self._in_layers:
            new[_FORWARD] = fwd
        return args, new

    def _layer(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a decoder layer: its stage, then its own mask and positions."""
        kwargs = dict(kwargs)
        fwd: Forward | None = kwargs.pop(_FORWARD, None)
        if fwd is None:
            return args, kwargs
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number in fwd.entered:
            # Older transformers run hooks again when gradient checkpointing recomputes a layer: it
            # is then given what it was given the first time.
            for step in fwd.entered[number].steps:
                hidden = step(hidden)
        else:
            hidden = self._enter_layer(number, layer, fwd, hidden, kwargs)
        return (hidden, *args), {**kwargs, **fwd.entered[number].changed}

    def _enter_layer(
        self, number: int, layer: nn.Module, fwd: Forward, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Run the stages of a layer, and settle what it is given; returns its hidden states."""
        given = kwargs["position_embeddings"]
        steps: list[Step] = []
        for order, stage in self.plan.decoder_stages.get(number, ()) if fwd.images else ():
            if stage.needs.attention and stage.needs.attention_layer == "own":
                rotary = fwd.rotary(number, hidden, given)
                own_attention(stage, fwd, number, hidden, layer, rotary, capture)
            steps.append(self._run(stage, order, fwd, hidden))
            hidden = steps[-1](hidden)
        # Gaps in the ids look like packed sequences to FlashAttention.
        changed: dict[str, Any] = {"position_ids": None}
        if fwd.differs(number):
            changed["attention_mask"] = fwd.layer_mask(number, hidden)
            changed["position_embeddings"] = fwd.rotary(number, hidden, given)
        fwd.enter(number, steps, changed)
        return hidden

    def _run(self, stage: Stage, number: int, fwd: Forward, hidden: Tensor) -> Step:
        if not isinstance(stage.budget, Budget):
            return run_withdrawal(self.method, stage, number, fwd)
        return run_selection(self.method, stage, stage.budget, number, fwd, hidden)

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After the decoder: give the cache its ledgers and the output its length back."""
        fwd, self._current = self._current, None
        if fwd is None:
            return None
        trace = fwd.close(cache_of(output))
        if trace is not None:
            self.trace = trace
            output.last_hidden_state = self._outputs.expand(
                fwd.table, output.last_hidden_state, trace
            )
        else:
            self._outputs.forget()
        return output

    # Probes ----------------------------------------------------------------------------------

    def _watch_layer(
        self, number: int, stage: Stage
    ) -> Callable[[Tensor, Tensor, float], None] | None:
        fwd = self._current
        if fwd is None or not fwd.images:
            return None
        return decoder_attention(stage, fwd, number)
