# SPDX-License-Identifier: Apache-2.0
"""A pruned model for lmms-eval, without a fork of it.

::

    python -m lmms_eval --model visprune --tasks gqa
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=todre,num_keep=64

in one line, after ``pip install "visprune[lmms-eval]"``.

Method and parameters are model arguments and come from nowhere else, since lmms-eval's response
cache knows a model by its name and ``model_args`` alone: a setting from an environment variable or
a patch would be answered with another run's answers. Prompts are lmms-eval's, in the model's own
chat template.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import GenerationConfig

from visprune.catalog import get_method
from visprune.core.method import PruningMethod
from visprune.errors import ConfigError, UnsupportedModel
from visprune.eval.models.base import NONE, ModelEntry
from visprune.eval.models.load_vlm import load as load_vlm
from visprune.eval.models.vlm import VLM
from visprune.eval.run.runner import process_number
from visprune.eval.tasks.loading import to_rgb
from visprune.machine.saved import read_method

__all__ = ["Visprune"]

logger = logging.getLogger(__name__)

# What lmms-eval says for "greedy", in words that generate() complains about.
_SAMPLING = ("temperature", "top_p", "top_k")


class Visprune(lmms):
    """A transformers vision-language model under a method.

    Args:
        pretrained: ``embedded``, a folder, or a name on the Hub.
        method: a name of ``visprune methods``; ``none`` for the untouched model; left out, the
            method that the folder was saved with, if it was.
        batch_size: questions asked together.
        device: torch device; ``None``: a GPU of this process, else the CPU.
        dtype: ``auto``, ``float32``, ``float16`` or ``bfloat16``.
        attn_implementation: attention of transformers; ``None``: its own choice.
        revision: of the Hub.
        max_batch_size: ignored; lmms-eval passes it to every model.
        **params: parameters of the method, ``num_keep=64`` among them.

    Raises:
        ConfigError: an unknown model, method or parameter.
        UnsupportedModel: the model lacks what the method needs.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "embedded",
        method: str | None = None,
        batch_size: int | str | None = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        max_batch_size: int | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        try:
            self.batch_size_per_gpu = int(batch_size or 1)
        except ValueError as error:
            raise ConfigError(f"batch_size is a number, got {batch_size!r}.") from error
        chosen = _method(pretrained, method, params)
        self._rank, self._world_size, local = process_number()
        # lmms-eval's own default device is the first GPU, also for the second process.
        wanted = "auto" if device in (None, "", "cuda", "cuda:0") else str(device)
        spec = ModelEntry(
            pretrained, dtype=dtype, device=wanted, attention=attn_implementation, revision=revision
        )
        self.vlm: VLM = load_vlm(spec, local)
        self.run = None if chosen is None else self.vlm.attach(chosen)
        if method is None and chosen is not None and self._rank == 0:
            logger.warning(f"{pretrained} was saved with {chosen}: answers are of that method; "
                        f"method={NONE} asks the untouched model.")  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.vlm.model.device

    @property
    def batch_size(self) -> int:
        """Questions asked together."""
        return self.batch_size_per_gpu

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer requests, in their order; those with the same options are batched."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[-4], sort_keys=True), []).append(number)
        answers: dict[int, GenerationResult] = {}
        # As lmms-eval's own models show it.
        with tqdm(total=len(requests), disable=self._rank != 0, desc="Model Responding") as bar:
            for options, numbers in groups.items():
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    made = self._answer([requests[i] for i in batch], json.loads(options))
                    answers.update(zip(batch, made, strict=True))
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, requests: Sequence[Any], options: dict[str, Any]) -> list[GenerationResult]:
        """Ask one batch."""
        processor = self.vlm.processor
        texts, images = [], []
        for request in requests:
            # (ctx,) doc_to_messages, generation options, document, task, split
            to_messages, _, document, task, split = request.args[-5:]
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][document]))
            pictures, videos, sounds = messages.extract_media()
            if videos or sounds:
                raise UnsupportedModel(f"{task} has video or audio; visprune reads pictures here.")
            texts.append(self.vlm.chat(messages.to_hf_messages()))
            images.append([to_rgb(picture) for picture in pictures])
        inputs = processor(
            text=texts, images=images if any(images) else None, padding=True,
            padding_side="left", return_tensors="pt",
        )  # fmt: skip
        inputs = inputs.to(self.device, dtype=self.vlm.dtype)
        ids = self.vlm.model.generate(**inputs, **_generation(options))
        new = ids[:, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        until = options.get("until") or []
        results = []
        for text, context, row in zip(said, texts, new.cpu(), strict=True):
            answer = _cut(text, [until] if isinstance(until, str) else until).strip()
            count = self.vlm.length(row, {})
            results.append(
                GenerationResult(text=answer, token_counts=TokenCounts(output_tokens=count))
            )
            self.cache_hook.add_partial("generate_until", (context, options), answer)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: say so instead of scoring what was not asked."""
        raise UnsupportedModel("visprune answers generate_until tasks; choose those of a task.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise UnsupportedModel("visprune answers one round of generate_until.")


def _method(pretrained: str, method: str | None, params: Mapping[str, Any]) -> PruningMethod | None:
    """The method that arguments name, else that of the folder; ``None``: the untouched model.

    Raises:
        ConfigError: parameters without a method, or an unknown name or parameter.
    """
    if method is not None and method != NONE:
        return get_method(method, **params)
    if params:
        said = f"method={NONE} takes no" if method else "without method= there are no"
        raise ConfigError(f"{said} parameters, got {', '.join(params)}.")
    saved = read_method(pretrained) if method is None and Path(pretrained).is_dir() else None
    return None if saved is None else get_method(saved.pop("method"), **saved)


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's options as those of ``generate``; temperature 0 is greedy search."""
    known = GenerationConfig()  # tasks also pass options for other models, and `until`
    kept = {k: v for k, v in options.items() if hasattr(known, k) and v is not None}
    sample = bool(kept.pop("do_sample", False)) and float(kept.get("temperature", 1.0)) > 0.0
    if not sample:
        kept = {k: v for k, v in kept.items() if k not in _SAMPLING}
    return {"max_new_tokens": 1024, "num_beams": 1, **kept, "do_sample": sample}


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    found = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(found)] if found else text
