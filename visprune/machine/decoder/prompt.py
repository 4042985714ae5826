# SPDX-License-Identifier: Apache-2.0
"""Where the prompt of a call ends: as it was told, by the labels, or by the input of ``generate``.

Methods that choose by the prompt's last token have to know it where more tokens come behind it in
one call: an answer to be learned or scored, an assistant's guesses, or what was generated so far.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.encoders.base import Instead
from visprune.backbones.vlm.base import VLMAdapter
from visprune.core.signals.base import DecoderSignal
from visprune.core.threads import PerThread
from visprune.errors import ConfigError
from visprune.machine.decoder.call import Call
from visprune.machine.plan import Plan

_ARGUMENT = "prompt_length"


class _Told(PerThread):
    """What is known of the call that is under way.

    Attributes:
        prompt: where the prompt ends, as it was told to the model or is seen in its labels.
        generating: columns of the prompt of the ``generate`` that is under way.
    """

    prompt: int | Tensor | None = None
    generating: int | None = None


class PromptEnd:
    """Finds the end of the prompt for one pruned model.

    Args:
        adapter: the model family.
        plan: of the method: whether any of its stages asks for the prompt's last token.
        name: the method's name, for messages.
        everything: whether the method wants the last token of the call, whatever it is.
        warn: called with a key and a message that is to be said once.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        plan: Plan,
        name: str,
        everything: bool,
        warn: Callable[[str, str], None],
    ) -> None:
        self._adapter, self._name, self._everything, self._warn = adapter, name, everything, warn
        self._asked = plan.cache is not None or any(
            isinstance(s, DecoderSignal) for x in plan.stages for s in x.signals
        )
        self._told = _Told()

    def install(self) -> Any:
        """Stand in place of the model's ``generate``; returns what undoes it."""
        model = self._adapter.model
        wrapped = update_wrapper(partial(self._generate, model.generate), model.generate)
        return Instead(model, "generate", wrapped)

    def _generate(self, original: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's ``generate``: its prompt ends where its input does."""
        before = self._told.generating
        self._told.generating = _prompt_columns(original, args, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            self._told.generating = before

    def model_begins(self, kwargs: dict[str, Any]) -> None:
        """Take ``prompt_length`` out of the model's arguments, or read its labels."""
        told = kwargs.pop(_ARGUMENT, None)
        labels = kwargs.get("labels")
        if told is None and labels is not None and self._asked:
            told = self._before_labels(labels, kwargs.get("input_ids"))
        self._told.prompt = told

    def core_begins(self, kwargs: dict[str, Any]) -> None:
        """Take ``prompt_length`` out of the arguments of the core, called by itself."""
        told = kwargs.pop(_ARGUMENT, None)
        if told is not None:
            self._told.prompt = told

    def model_ends(self) -> None:
        """The call is over, also by an error."""
        self._told.prompt = None

    def columns(self) -> int | Tensor | None:
        """Columns of the prompt, from the beginning of the cache: of all rows, or ``[B]``.

        ``None``: the call ends with it.
        """
        prompt = self._told.prompt
        return self._told.generating if prompt is None and not self._everything else prompt

    def check(self, call: Call) -> None:
        """Refuse a call with pictures that ends within its prompt, if its end is asked for.

        Raises:
            ConfigError: it does.
        """
        if call.images and call.prompt_goes_on and self._asked:
            raise ConfigError(
                f"{self._name} looks at the last token of the prompt, and this call ends before it "
                f"(chunked prefill). Give the prompt in one call, or use a method that acts at the "
                f"projector."
            )

    def _before_labels(self, labels: Tensor, ids: Tensor | None) -> Tensor | None:
        """Tokens before the first one that is to be learned, ``[B]``."""
        wanted = labels != -100
        first = wanted.to(torch.uint8).argmax(dim=1)
        first = torch.where(wanted.any(dim=1), first, labels.shape[1])
        token = self._adapter.token_id("image")
        if ids is not None and token is not None and ids.shape == labels.shape:
            steps = torch.arange(ids.shape[1], device=ids.device)
            if bool(((ids == token) & (steps >= first.to(ids.device)[:, None])).any()):
                self._warn(
                    "labels",
                    f"{self._name} looks at the last token of the prompt, and the labels do not "
                    f"say where the prompt ends: they begin before the picture. The last token of "
                    f"the call is taken. Set labels of the prompt to -100, or pass "
                    f"prompt_length=... (tokens of the prompt) to the model.",
                )
                return None
        return first


def _prompt_columns(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Columns of the prompt that a ``generate`` is given."""
    try:
        bound = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return None
    given = {**bound.pop("kwargs", {}), **bound}
    for name in ("inputs", "input_ids", "inputs_embeds"):
        if isinstance(given.get(name), Tensor):
            return int(given[name].shape[1])
    return None
