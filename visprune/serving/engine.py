# SPDX-License-Identifier: Apache-2.0
"""vLLM as a part of a program: one engine, asked in batches, with the plug-in in it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from PIL import Image

from visprune.errors import ConfigError, first_line
from visprune.serving.asked import METHOD
from visprune.serving.vllm import ARCHITECTURES

__all__ = ["Answered", "Engine", "Prompt", "check_installed", "request_of"]

# What an engine is told by its arguments here, and by nobody else.
_OURS = ("model", "dtype", "limit_mm_per_prompt", "mm_processor_kwargs", "disable_log_stats")


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        ids: its tokens, with one placeholder for the picture.
        image: the picture; ``None``: text alone.
        settings: of the plug-in, by key (``visprune`` ...).
    """

    ids: Sequence[int]
    image: Image.Image | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Answered:
    """What came back.

    Attributes:
        prompt: tokens of the prompt as the model got it, pruned placeholders gone.
        ids: tokens of the answer, the one that ended it among them.
    """

    prompt: Sequence[int]
    ids: Sequence[int]


class Engine:
    """An engine, which lives as long as this object.

    Args:
        folder: of the model.
        architecture: of its configuration.
        dtype: a name of torch, such as ``"bfloat16"``.
        processor: options of the model's processor.
        options: of ``vllm.LLM``: ``tensor_parallel_size``, ``max_model_len`` ...

    Raises:
        ConfigError: vLLM is not here, does not find the plug-in, or does not start.
    """

    def __init__(
        self, folder: Path, architecture: str, *, dtype: str,
        processor: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_installed()
        check_options(options or {})
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # The caller's process has run torch: its threads do not outlive a fork.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from vllm import LLM

        self.prunes = architecture in ARCHITECTURES
        # A folder's own method is no default here: every request says what is done to it.
        default = {METHOD: None} if self.prunes else {}
        try:
            self._llm = LLM(
                model=str(folder), dtype=dtype, limit_mm_per_prompt={"image": 1},
                mm_processor_kwargs={**default, **(processor or {})} or None,
                disable_log_stats=True, **(options or {}),
            )  # fmt: skip
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"vLLM does not start with this model: {first_line(error)}"
            ) from error
        # Ends the engine's processes, now or when nobody holds this object any more.
        core = self._llm.llm_engine.engine_core
        self.close: Callable[[], Any] = weakref.finalize(self, core.shutdown)

    def ask(
        self, prompts: Sequence[Prompt], *, max_tokens: int, stop: Sequence[int],
        min_tokens: int = 0, repetition_penalty: float = 1.0,
    ) -> list[Answered]:  # fmt: skip
        """Answer prompts together, greedily, in order.

        Args:
            prompts: the prompts.
            max_tokens: of an answer, at most.
            stop: tokens that end an answer.
            min_tokens: of an answer, at least.
            repetition_penalty: as ``generate`` of transformers has it.

        Raises:
            ValueError: what vLLM refuses: a prompt that is too long, settings that do not fit.
        """
        from vllm import SamplingParams

        how = SamplingParams(
            temperature=0, max_tokens=max_tokens, min_tokens=min_tokens, detokenize=False,
            stop_token_ids=list(stop), repetition_penalty=repetition_penalty,
        )  # fmt: skip
        found = self._llm.generate([request_of(one) for one in prompts], how, use_tqdm=False)
        return [Answered(one.prompt_token_ids or [], one.outputs[0].token_ids) for one in found]


def check_installed(
    what: str = "The engine vllm", instead: str = ", or take the engine transformers"
) -> None:
    """Raise unless vLLM is here and finds the plug-in.

    Without the plug-in a request's settings would be read by nobody, and nothing pruned.

    Args:
        what: needs it.
        instead: what else one may do, in words.

    Raises:
        ConfigError: see above.
    """
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{what} needs vLLM in this environment ({first_line(error)}). Install "
            f'"visprune[vllm]" beside your vllm{instead}.'
        ) from error
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and "visprune" not in named.split(","):
        raise ConfigError(
            f"VLLM_PLUGINS={named!r} leaves visprune's plug-in out of vLLM. Unset it, or add "
            f"visprune to it."
        )
    if "visprune" not in [x.name for x in entry_points(group="vllm.general_plugins")]:
        raise ConfigError(
            "vLLM does not find visprune's plug-in: the installed package has no entry point for "
            "it. Install visprune again in this environment."
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of ``vllm.LLM`` that are set here.

    Raises:
        ConfigError: there is one.
    """
    for name in options:
        if name in _OURS:
            raise ConfigError(
                f"engine_options may not hold {name!r}: the model, its dtype and its processor's "
                f"options are keys of the model itself."
            )


def request_of(one: Prompt) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    request: dict[str, Any] = {"prompt_token_ids": list(one.ids)}
    if one.image is None:
        return request
    request["multi_modal_data"] = {"image": one.image}
    return {**request, "mm_processor_kwargs": dict(one.settings)} if one.settings else request
