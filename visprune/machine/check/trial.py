# SPDX-License-Identifier: Apache-2.0
"""A family that nobody proved: its first prompt with a picture is checked before it is pruned."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn

from visprune.backbones.encoders.base import Instead
from visprune.backbones.hf.cache import cache_of
from visprune.backbones.vlm.base import VLMAdapter
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.check.attach import still
from visprune.machine.check.contract import Contract, tried
from visprune.machine.check.prompts import Inputs, pictured, prompt_of
from visprune.machine.check.report import Report


def setting(adapter: VLMAdapter) -> str:
    """Version, dtype, device and attention kernel of a model."""
    weight: Any = adapter.head.weight
    kernel = adapter.text_config._attn_implementation
    version = getattr(inspect.getmodule(inspect.unwrap(type(adapter.model))), "__version__", None)
    package = type(adapter.model).__module__.partition(".")[0]
    version = version or _version(package)
    return (
        f"{package} {version}, torch {torch.__version__}, "
        f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}, attention {kernel}"
    )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "of its own"


def report_on(adapter: VLMAdapter) -> Report:
    """A report without rows."""
    kind = adapter.config.model_type
    how = f"of {kind}, proved by this library's tests"
    if not adapter.proved:
        how = f"generic, tried: {kind} is no family that this library was proved on"
    return Report(f"{type(adapter.model).__name__} ({kind})", setting(adapter), how)


@torch.no_grad()
def short_check(adapter: VLMAdapter, inputs: Inputs) -> Report:
    """Keep all against untouched, drop against hide, and generation from the cache."""
    report = report_on(adapter)
    with still(adapter.model):
        contract = Contract(adapter, inputs)
        for name in ("keep_all", "hidden", "cached"):
            report.rows.append(tried(name, getattr(contract, name)))
    return report


class Trial:
    """Waits for the first prompt with a picture, and checks the model on it.

    Args:
        adapter: the model, not proved.
        pause: takes a run's hooks off.
        resume: puts them on again, once the check has passed.
        stop: ends the run, where it has not.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        pause: Callable[[], None],
        resume: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self.adapter, self._pause, self._resume, self._stop = adapter, pause, resume, stop
        self.report: Report | None = None
        self._busy = threading.RLock()
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_busy"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _busy=threading.RLock())

    @property
    def why(self) -> str:
        """Why pictures are not pruned yet."""
        return (
            f"{self.adapter.config.model_type} is no family that visprune was proved on, and is "
            f"checked on the first whole prompt: call the model, or its generate, with input_ids "
            f"and pixels, without a cache, before pictures that were encoded by hand."
        )

    def install(self) -> None:
        """Stand before the model's ``forward`` and ``generate``."""
        model = self.adapter.model
        self._handles.append(model.register_forward_pre_hook(self._called, with_kwargs=True))
        wrapped = update_wrapper(partial(self._generate, model.generate), model.generate)
        self._handles.append(Instead(model, "generate", wrapped))

    def remove(self) -> None:
        """Wait no longer."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable
    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._try({**dict(zip(names, args, strict=False)), **kwargs})

    def _generate(self, original: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._try({**({"inputs": args[0]} if args else {}), **kwargs})
        return getattr(self.adapter.model, "generate")(*args, **kwargs)  # noqa: B009 - as it is now

    def _try(self, call: Mapping[str, Any]) -> None:
        """Check the model on the prompt of a call, once."""
        if not pictured(call):
            return
        with self._busy:
            if self.report is not None:
                return
            cache = cache_of(call)
            if cache is not None and cache.get_seq_length():
                raise ConfigError(self.why)
            prompt = prompt_of(self.adapter, call)
            self._pause()
            self.report = short_check(self.adapter, prompt)
            if not self.report.safe:
                self._stop()
                raise UnsupportedModel(
                    f"{type(self.adapter.model).__name__} ({self.adapter.config.model_type}) was "
                    f"tried with the generic adapter, and is refused: "
                    f"{self.report.first_failure or self.report.verdict}"
                )
            self._resume()
