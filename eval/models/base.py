# SPDX-License-Identifier: Apache-2.0
"""What answers: a model by name, and the one interface through which the runner asks it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image

from visprune.core.method import PruningMethod
from visprune.errors import ConfigError
from visprune.eval.models.names import check_ran_by
from visprune.eval.tasks.base import PromptStyle, Sample, Task
from visprune.eval.tasks.loading import Unreachable

__all__ = [
    "NONE",
    "NO_IMAGE",
    "Answerer",
    "Choice",
    "EvalModel",
    "ModelEntry",
    "Output",
    "Request",
    "offline",
]

NONE = "none"  # the untouched model
NO_IMAGE = "no_image"  # the model without the picture: the floor that the text alone reaches
Choice = PruningMethod | str  # a method, NONE or NO_IMAGE


@dataclass(frozen=True)
class Request:
    """One sample as it is put to a model.

    Attributes:
        sample: the sample.
        prompt: the user's turn.
        image: the picture; ``None`` under ``no_image``.
        digest: of its pixels: requests with the same one are about the same picture. ``None``: not
            known; nothing is then shared with other requests.
    """

    sample: Sample
    prompt: str
    image: Image.Image | None
    digest: str | None = None


@dataclass(frozen=True)
class Output:
    """What a model gave for one sample; fields as in :class:`visprune.eval.records.Record`."""

    text: str
    tokens: float | None = None
    macs: Mapping[str, int] | None = None
    kv_bytes: int | None = None
    new_tokens: int | None = None
    kept: Mapping[str, Any] | None = None
    beyond: int | None = None


class Answerer(Protocol):
    """A model under one method."""

    def __call__(self, requests: Sequence[Request]) -> list[Output]:
        """Answer requests together, in order."""


class EvalModel(Protocol):
    """A model that the runner can ask.

    Attributes:
        name: as the user wrote it.
        generates: it answers with text; else with class numbers.
        style: how questions are put unless the study says otherwise.
    """

    name: str
    generates: bool
    style: PromptStyle

    @property
    def together(self) -> int:
        """Samples that are best asked together, where nobody says how many."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies it: name, weights, dtype ... (enters every key)."""

    def refusal(self, choice: Choice, task: Task) -> str | None:
        """Return why it cannot run a method or a task, or ``None``."""

    def generation(self, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of ``generate`` for a task (empty where nothing is generated)."""

    def answering(
        self, choice: Choice, task: Task, style: str, generation: Mapping[str, Any]
    ) -> AbstractContextManager[Answerer]:
        """Attach a method for as long as the context lasts."""

    def encodes(self, choice: Choice) -> Hashable:
        """Return what is equal for methods that see the same encoding of a picture."""

    def forget(self) -> None:
        """Drop what is held of pictures that were asked about."""

    def no_turns(self, *, query_aware: bool = True) -> str | None:
        """Return why several questions cannot be put to one cache; ``None``: they can.

        Args:
            query_aware: the cache is made with the first question in the prompt.
        """

    def prompt_length(self, prompt: str) -> int:
        """Return how long a prompt is: prompts of one length are best asked together."""

    def unseen(self, size: tuple[int, int]) -> str | None:
        """Say what it does not see of a picture of that width and height; ``None``: nothing."""


@dataclass(frozen=True)
class ModelEntry:
    """A model as a study names it.

    Args:
        name: ``embedded``; a folder of a transformers vision-language model or of a timm model
            (Hub layout), or a name on the Hub; ``timm:NAME``; ``open_clip:NAME/PRETRAINED``, or
            ``open_clip:NAME`` with a ``checkpoint``.
        dtype: ``auto`` (as saved), ``float32``, ``float16`` or ``bfloat16``.
        device: ``auto`` (CUDA if there is one), or a torch device.
        attention: attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2`` ...;
            ``None``: its own choice.
        template: markup around a prompt, with ``<image>`` and ``{prompt}``; ``None``: the
            processor's chat template, or LLaVA-1.5's ``vicuna_v1`` for the style ``llava15``.
        processor: options of the processor (``min_pixels``, ``max_pixels``, ``do_pad`` ...).
        revision: of the Hub.
        checkpoint: weights of a timm or open_clip model (safetensors); ``None``: the pretrained
            ones.
        pad: put pictures into a square of the processor's mean colour first, as LLaVA's own
            evaluation does (its processor on the Hub cuts the middle out); of vision-language
            models.
        engine: what answers: ``transformers`` (for timm and open_clip: themselves), or ``vllm``,
            which batches questions, for the methods that it can run.
        engine_options: options of ``vllm.LLM`` (``tensor_parallel_size``, ``max_model_len`` ...).

    Raises:
        ConfigError: an unknown dtype or engine, options of an engine that takes none, or a device
            that torch does not know.
    """

    name: str
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    template: str | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    checkpoint: str | None = None
    pad: bool = False
    engine: str = "transformers"
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ran_by(self.dtype, self.engine)
        if self.engine_options and self.engine != "vllm":
            raise ConfigError(
                f"engine_options ({', '.join(self.engine_options)}) are of the engine vllm; this "
                f"model's engine is {self.engine}."
            )
        if self.device != "auto":
            _device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, as a study of before there were its newer keys wrote it."""
        newer = {"pad": False, "engine": "transformers", "engine_options": {}}
        found = dataclasses.asdict(self)
        return {k: v for k, v in found.items() if k not in newer or v != newer[k]}

    def torch_device(self, local_rank: int = 0) -> torch.device:
        """The device to run on; processes of one machine take one GPU each.

        Raises:
            Unreachable: it is not there.
        """
        if self.device == "auto":
            if not torch.cuda.is_available():
                return torch.device("cpu")
            return torch.device("cuda", local_rank % torch.cuda.device_count())
        device = _device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise Unreachable(
                f"The device {self.device!r} was asked for, but there is no GPU here."
            )
        return device


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"Unknown device {name!r}; such as cpu or cuda:0.") from error


def offline() -> bool:
    """Whether the Hub may not be asked (``HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
