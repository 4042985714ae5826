# SPDX-License-Identifier: Apache-2.0
"""Vision-language models that vLLM answers for, under the methods that its plug-in can run.

Words, pictures and identity are those of :class:`visprune.eval.models.vlm.VLM`, over a model
without weights: they are in the engine, which starts with the first question. So nothing of a
study that is refused costs more than reading a configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, VispruneError, first_line
from visprune.eval.models.base import (
    NONE,
    Answerer,
    Choice,
    ModelEntry,
    Output,
    Request,
    offline,
)
from visprune.eval.models.names import EMBEDDED
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.eval.tasks.base import Task
from visprune.machine.saved import read_asked
from visprune.serving.asked import METHOD, as_settings, read
from visprune.serving.engine import Engine, Prompt, check_installed, check_options
from visprune.serving.places import shown_layers, spec_of
from visprune.serving.vllm import ARCHITECTURES

__all__ = ["Served", "file_hash", "load"]

# What generate of transformers and vLLM both know, by vLLM's name.
_GENERATION = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
}
_IN_FLIGHT = 64  # questions that it is given at once
_GREEDY = {"do_sample": False, "num_beams": 1}
_CHUNK, _CHUNKS = 4096, 256


class Served(VLM):
    """A model in vLLM.

    Args:
        model: the model on the ``meta`` device, with the dtype that it is served in.
        processor: its processor.
        folder: where it lies.
        options: of the processor, and of ``vllm.LLM``.
        more: see :class:`visprune.eval.models.vlm.VLM`.
    """

    def __init__(
        self, model: Any, processor: Any, folder: Path, *,
        options: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}), **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, processor, **more)
        self.folder, self._options = folder, options
        self.architecture = str((model.config.architectures or ["?"])[0])
        self._weights = file_hash(folder)
        self._engine: Engine | None = None

    def describe(self) -> dict[str, Any]:
        """What identifies it; other than the same model in transformers, by name too."""
        found = {**super().describe(), "attention": "vllm", "engine": "vllm"}
        if self._prunes and not self._spec.multi_axis_rope:
            found["positions"] = "compact"  # of every pruned prompt, see the plug-in
        return {**found, **({"engine_options": dict(more)} if (more := self._options[1]) else {})}

    def refusal(self, choice: Choice, task: Task) -> str | None:
        """Why it cannot run a method or a task, or ``None``."""
        if isinstance(choice, str):
            return super().refusal(choice, task)
        if (why := super().refusal(NONE, task)) is not None:
            return why
        if not self._prunes:
            return (
                f"{self.architecture} is served as vLLM serves it, visprune is not in it; it is in "
                f"{', '.join(ARCHITECTURES)}."
            )
        try:
            read(self._settings(choice), {}, self._spec, shown_layers(self.model.config))
        except VispruneError as error:
            fits = ",".join(f"{k}={str(v).lower()}" for k, v in choice.served.items())
            return f"{error}{f' With {choice.name},{fits} it can.' if fits else ''}"
        return None

    @property
    def together(self) -> int:
        """The engine batches what it is given by itself."""
        return _IN_FLIGHT

    def no_turns(self, *, query_aware: bool = True) -> str | None:
        """The engine keeps caches of its own."""
        return "vLLM makes the cache of each prompt itself. Take the engine transformers."

    def generation(self, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
        """Greedy, as long as the task asks for, with the penalty that the model comes with.

        Raises:
            ConfigError: an option that the engine is not given.
        """
        for name, value in options.items():
            if name not in _GENERATION and _GREEDY.get(name, value) != value:
                raise ConfigError(
                    f"generation: {name}={value!r} is not for the engine vllm, whose answers are "
                    f"greedy here. Leave it out, or take the engine transformers."
                )
            if name not in _GENERATION and name not in _GREEDY:
                raise ConfigError(
                    f"generation has {name!r}, which the engine vllm is not given; it takes "
                    f"{', '.join(_GENERATION)}."
                )
        made = super().generation(task, options)
        own = getattr(self.model.generation_config, "repetition_penalty", None)
        return {**({} if own in (None, 1.0) else {"repetition_penalty": own}), **made}

    def encodes(self, choice: Choice) -> Hashable:
        """The engine has caches of its own, and keeps them apart."""
        return None

    @contextmanager
    def answering(
        self, choice: Choice, task: Task, style: str, generation: Mapping[str, Any]
    ) -> Iterator[Answerer]:
        """Requests under a method; the engine starts with the first cell."""
        settings = self._settings(choice)
        self._started()  # here: an engine that does not start is no error of a question
        yield lambda requests: self._served(requests, settings, style, generation)

    def close(self) -> None:
        """End the engine; it starts again with the next question."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    # ------------------------------------------------------------------------------------------

    @property
    def _prunes(self) -> bool:
        return self.architecture in ARCHITECTURES

    @property
    def _spec(self) -> Any:
        return spec_of(self.model.config)

    def _settings(self, choice: Choice) -> dict[str, Any]:
        """A method as a request names it."""
        if isinstance(choice, PruningMethod):
            return as_settings(choice.to_dict())
        return {METHOD: None} if self._prunes else {}

    def _started(self) -> Engine:
        if self._engine is None:
            processor, options = self._options
            dtype = str(self.dtype).removeprefix("torch.")
            self._engine = Engine(
                self.folder, self.architecture, dtype=dtype, processor=processor, options=options
            )
        return self._engine

    def _served(
        self, requests: Sequence[Request], settings: Mapping[str, Any], style: str,
        generation: Mapping[str, Any],
    ) -> list[Output]:  # fmt: skip
        prompts = []
        for request in map(self._padded, requests):
            text = self.markup(request.prompt, style, picture=request.image is not None)
            ids = self.processor.tokenizer(text)["input_ids"]
            prompts.append(Prompt(ids, request.image, settings))
        how = {_GENERATION[k]: v for k, v in generation.items() if k in _GENERATION}
        found = self._started().ask(prompts, stop=self._ends, **how)
        said = self.processor.tokenizer.batch_decode(
            [list(one.ids) for one in found], skip_special_tokens=True
        )
        mark = None if self.adapter is None else self.adapter.token_id("image")
        return [
            Output(
                text=text.strip(),
                # No layer has fewer than another: see the plug-in.
                tokens=None if mark is None else float(list(one.prompt).count(mark)),
                new_tokens=len(one.ids),
                kept=self._kept(None, 0, request),
            )
            for request, one, text in zip(requests, found, said, strict=True)
        ]

    @property
    def _ends(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return [end] if isinstance(end, int) else list(end or ())


def load(spec: ModelEntry) -> Served:
    """Read a model's configuration and processor for the engine vllm.

    Raises:
        ConfigError: vLLM is not here, there is no such model, or an option is not for vLLM.
    """
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
        GenerationConfig,
    )

    _check(spec)
    check_installed()
    folder = _folder(spec)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, **spec.processor)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ConfigError(
            f"transformers cannot read a vision-language model and its processor from "
            f"{spec.name!r}: {first_line(error)}."
        ) from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    options = (spec.processor, spec.engine_options)
    model = model.eval().to(_dtype(spec, config))
    if spec.name == EMBEDDED:
        return Served(model, processor, folder, options=options, name=f"{EMBEDDED} (vLLM)",
                      template=spec.template or PLAIN, style="plain", pad=spec.pad)  # fmt: skip
    asked: Any = read_asked(folder) or {}
    return Served(model, processor, folder, options=options, name=f"{spec.name} (vLLM)",
                  template=spec.template or asked.get("template"), style=asked.get("style"),
                  pad=spec.pad)  # fmt: skip


def _check(spec: ModelEntry) -> None:
    """Refuse what is vLLM's own to decide."""
    check_options(spec.engine_options)
    if spec.attention is not None:
        raise ConfigError(
            f"attention={spec.attention!r} is of the engine transformers; vLLM has its own."
        )
    if spec.device != "auto":
        raise ConfigError(
            f"device={spec.device!r} is of the engine transformers; vLLM runs where it was built "
            f"for. CUDA_VISIBLE_DEVICES chooses among GPUs."
        )


def _folder(spec: ModelEntry) -> Path:
    """Where the model's files lie, brought from the Hub where they are not here."""
    if spec.name == EMBEDDED:
        from visprune.backbones.vlm.embedded import WEIGHTS

        return WEIGHTS
    if Path(spec.name).is_dir():
        return Path(spec.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(
            spec.name, revision=spec.revision, local_files_only=offline(),
            ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"],
        ))  # fmt: skip
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(f"There is no model {spec.name!r}: {first_line(error)}.") from error


def _dtype(spec: ModelEntry, config: Any) -> torch.dtype:
    """As saved, or as asked for: vLLM's own choice for float32 would be another."""
    if spec.dtype != "auto":
        found: torch.dtype = getattr(torch, spec.dtype)
        return found
    saved = getattr(config, "dtype", None)
    saved = saved or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, saved) if isinstance(saved, str) else saved


def file_hash(folder: Path) -> str:
    """SHA-256 over a folder's weights: names, sizes, and 1 MiB of each file, evenly spaced.

    The weights themselves are read by the engine's processes alone.

    Returns:
        16 hex digits.
    """
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        last = max(0, size - _CHUNK)
        places = sorted({last * number // (_CHUNKS - 1) for number in range(_CHUNKS)})
        with path.open("rb") as file:
            for place in places:
                file.seek(place)
                found.update(file.read(_CHUNK))
    return found.hexdigest()[:16]
