# SPDX-License-Identifier: Apache-2.0
"""Vision-language models of transformers, asked through their processor and ``generate``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import ImageLayout, Picture
from visprune.backbones.vlm.seen import Canvas, Seen
from visprune.catalog import adapters
from visprune.core.method import PruningMethod
from visprune.cost.cost import Cost, ModelShape
from visprune.errors import ConfigError, UnsupportedModel, did_you_mean
from visprune.eval.models.base import (
    NO_IMAGE,
    NONE,
    Answerer,
    Choice,
    Output,
    Request,
)
from visprune.eval.models.encodings import Encodings, image_token
from visprune.eval.models.identity import config_hash, plain, processor_hash, weights_hash
from visprune.eval.models.kept import kept_map
from visprune.eval.models.learned import about_learned, taught
from visprune.eval.models.seen import describe_seen, pad_to_square, seen_of_record
from visprune.eval.models.turns import OneCache, no_turns
from visprune.eval.tasks import prompts
from visprune.eval.tasks.base import PromptStyle, Task
from visprune.eval.tasks.refcoco import RefCOCO
from visprune.machine.encoder.tap import listening
from visprune.machine.find import find_adapter, unwrap
from visprune.machine.price import prompt_costs, sample_costs
from visprune.machine.run import Run
from visprune.machine.sharing import encodes_alike

__all__ = ["PLAIN", "VLM"]

PLAIN = "USER: <image>\n{prompt} ASSISTANT:"
_SMALL, _TOGETHER = 50_000_000, 16  # weights of a small model; samples of it in a batch
_SAMPLING = ("temperature", "top_p", "top_k")
# Fields of a generation config that say nothing about the answers, or that greedy search ignores.
_SILENT = ("transformers_version", "_from_model_config", "max_new_tokens", "max_length",
           "do_sample", "num_beams", *_SAMPLING)  # fmt: skip


def _of(size: Any, edge: str) -> Any:
    """An entry of a processor's ``size``: a mapping, or an object with its keys as attributes."""
    return size.get(edge) if isinstance(size, Mapping) else getattr(size, edge, None)


class VLM:
    """A transformers model with its processor.

    Args:
        model: the model.
        processor: its processor.
        name: what it is called in tables.
        template: markup around a prompt; see :class:`visprune.eval.models.base.ModelEntry`.
        style: how questions are put; ``None``: by family.
        pad: put pictures into a square of the processor's mean colour before it prepares them, as
            LLaVA's own evaluation does.
        learned: what the method that it is asked under has learned, by name.
    """

    generates = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str | None = None,
        template: str | None = None,
        style: PromptStyle | None = None,
        pad: bool = False,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.processor, self.template = model, processor, template
        self.learned = learned
        # A folder's name alone: where it lies is nobody's business, and differs between machines.
        self.name = name or Path(model.config._name_or_path).name or type(model).__name__
        self.pad = pad
        self.family = str(model.config.model_type)
        known: Any = adapters.get(self.family) if self.family in adapters else VLMAdapter
        self.style: PromptStyle = style or known.prompt_style
        self._markup: str | None = known.markup
        prompts.check_style(self.style)
        self._weights = weights_hash(model)
        try:
            self.adapter = find_adapter(model)
        except UnsupportedModel as error:
            self.adapter, self.no_adapter = None, str(error)
        self.encodings = Encodings(model, processor, self.adapter)

    def describe(self) -> dict[str, Any]:
        """What identifies the model; see :class:`visprune.eval.models.base.EvalModel`."""
        config = unwrap(self.model).generation_config.to_diff_dict()
        return {
            "name": self.name,
            "family": self.family,
            "weights": self._weights,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": str(self.model.config._attn_implementation),
            "template": self.template,
            "config": config_hash(self.model),
            "processor": processor_hash(self.processor),
            "generation_config": plain({k: v for k, v in config.items() if k not in _SILENT}),
            **({"pad": True} if self.pad else {}),
            **about_learned(self.learned),
        }

    @property
    def together(self) -> int:
        """Several where they cost little memory and one of them mostly what surrounds the model.

        In half precision answers depend on what is asked together; on a GPU the bound is its
        memory, which is for the user to say.
        """
        small = sum(weight.numel() for weight in self.model.parameters()) < _SMALL
        single = self.dtype == torch.float32 and self.model.device.type == "cpu"
        return _TOGETHER if small and single else 1

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def _shape(self) -> ModelShape | None:
        """What the untouched model costs by token; ``None`` where that cannot be counted."""
        try:
            return None if self.adapter is None else self.adapter.cost_shape()
        except UnsupportedModel as error:
            warnings.warn(
                f"The cost of {self.name} stays empty: {error}", UserWarning, stacklevel=2
            )
            return None

    def refusal(self, choice: Choice, task: Task) -> str | None:
        """Why it cannot run a method or a task, or ``None``."""
        if not task.generates:
            return f"{task.name} wants class numbers; {self.name} answers with text."
        if isinstance(task, RefCOCO) and (why := self._other_pixels(task)):
            return why
        if isinstance(choice, str):
            return None
        if self.adapter is None:
            return self.no_adapter
        try:
            self.attach(choice).remove()
        except (ConfigError, UnsupportedModel) as error:
            return str(error)
        return None

    def attach(self, method: PruningMethod) -> Run:
        """Prune the model, with what the method has learned.

        Raises:
            ConfigError: the method wants something learned, and the model came without it, or with
                something that does not fit; or the model is pruned already.
            UnsupportedModel: the method does not act on this model.
        """
        run: Run = taught(Run(find_adapter(self.model), method), self.learned, self.name)
        return run

    def _other_pixels(self, task: RefCOCO) -> str | None:
        """Why boxes in pixels would be read wrongly: the model sees another size than the task."""
        if task.scale != "pixels":
            return None
        size = getattr(self.processor.image_processor, "size", None) or {}
        own = (_of(size, "shortest_edge"), _of(size, "longest_edge"))
        if own == (task.min_pixels, task.max_pixels):
            return None
        return (
            f"{task.name} reads boxes in pixels of a picture of {task.min_pixels} to "
            f"{task.max_pixels} pixels; the processor of {self.name} has {own[0]} to {own[1]}. "
            f"Set min_pixels and max_pixels alike, on the model (processor) and on the task."
        )

    def generation(self, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
        """Greedy, as long as the task asks for, unless the study says otherwise."""
        greedy = {"max_new_tokens": task.max_new_tokens, "do_sample": False, "num_beams": 1}
        asked = {**greedy, **options}
        if asked["do_sample"]:  # the model's own settings count, and are in no other key
            own = unwrap(self.model).generation_config
            kept = {name: getattr(own, name, None) for name in _SAMPLING}
            asked = {**{k: v for k, v in kept.items() if v is not None}, **asked}
        return asked

    @contextmanager
    def answering(
        self, choice: Choice, task: Task, style: str, generation: Mapping[str, Any]
    ) -> Iterator[Answerer]:
        """Attach a method for as long as the context lasts."""
        self._shape  # noqa: B018 - read before anything is attached to the model

        options = dict(generation)
        query_aware = options.pop("query_aware", True)
        if options.pop("turns", None) is None and query_aware:
            answer = self._answer
        else:
            answer = partial(self._answer_on_one_cache, query_aware=query_aware)

        def ask(run: Run | None) -> Answerer:
            return lambda requests: answer(requests, run, style, options)

        if isinstance(choice, PruningMethod):
            with self.attach(choice) as run:
                yield ask(run)
        elif choice in (NONE, NO_IMAGE):
            yield ask(None)
        else:
            hint = did_you_mean(choice, (NONE, NO_IMAGE))
            raise ConfigError(f"{choice!r} is no method.{hint}")

    def encodes(self, choice: Choice) -> Hashable:
        """Methods that act inside the encoder, or read rare things of it, have their own."""
        if self.adapter is None or not isinstance(choice, PruningMethod):
            return None
        return encodes_alike(self.adapter, choice)

    def forget(self) -> None:
        """Drop what is held of pictures."""
        self.encodings.forget()

    def no_turns(self, *, query_aware: bool = True) -> str | None:
        """Why several questions cannot be put to one cache, or ``None``."""
        if self.adapter is None:
            return self.no_adapter
        return no_turns(self.adapter, query_aware=query_aware)

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt, without what is put around it."""
        return len(self.processor.tokenizer(prompt)["input_ids"])

    # One batch -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _answer(
        self, requests: Sequence[Request], run: Run | None, style: str, generation: dict[str, Any]
    ) -> list[Output]:
        inputs, layouts = self._prepared(requests, run, style)
        with self._heard(layouts is None and run is None) as heard:
            ids = self.model.generate(**inputs, **generation)
        new = ids[:, inputs["input_ids"].shape[1] :].cpu()
        counts = [self.length(row, generation) for row in new]
        said = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        costs, tokens = self._spent(run, inputs, self._places(inputs, layouts, heard), counts)
        kept = [self._kept(run, i, request) for i, request in enumerate(requests)]
        lengths = inputs["attention_mask"].sum(1).tolist()  # before anything is dropped
        return [
            Output(
                text=said[i].strip(),
                tokens=tokens[i],
                macs=None if (cost := costs[i]) is None else cost.parts,
                kv_bytes=None if cost is None else cost.kv_bytes,
                new_tokens=counts[i],
                kept=kept[i],
                beyond=self._beyond(lengths[i] + counts[i]),
            )
            for i in range(len(requests))
        ]

    @torch.inference_mode()
    def _answer_on_one_cache(
        self, requests: Sequence[Request], run: Run | None, style: str, generation: dict[str, Any],
        *, query_aware: bool,
    ) -> list[Output]:  # fmt: skip
        """Put questions about one picture to one cache; see :class:`OneCache`.

        Operations are not counted: they belong to all questions together.

        Raises:
            UnsupportedModel: they are about several pictures.
        """
        if requests[0].image is None or self.adapter is None:  # there is nothing to share
            return [self._answer([request], run, style, generation)[0] for request in requests]
        if len({request.digest or id(request.image) for request in requests}) > 1:
            raise UnsupportedModel("Questions share a cache where they are about one picture.")
        prepared = [self._prepared([request], run, style) for request in requests]
        inputs, layouts = prepared[0]
        with self._heard(layouts is None and run is None) as heard:
            cache = OneCache(self.model, self.adapter, inputs, query_aware=query_aware)
        places = self._places(inputs, layouts, heard)
        costs, tokens = self._spent(run, cache.inputs, places, [1])
        kept = self._kept(run, 0, requests[0])
        outputs = []
        for one, _ in prepared:
            new = cache.ask(one, generation).cpu()
            count = self.length(new, generation)
            said = self.processor.tokenizer.decode(new, skip_special_tokens=True)
            outputs.append(
                Output(
                    text=said.strip(),
                    tokens=tokens[0],
                    kv_bytes=None if (cost := costs[0]) is None else cost.kv_bytes,
                    new_tokens=count,
                    kept=kept,
                    beyond=self._beyond(one["input_ids"].shape[1] + count),
                )
            )
        return outputs

    def _prepared(
        self, requests: Sequence[Request], run: Run | None, style: str
    ) -> tuple[dict[str, Any], list[ImageLayout] | None]:
        """What the model takes, and where pictures are in it, if they are encoded already."""
        texts = [self.markup(r.prompt, style, picture=r.image is not None) for r in requests]
        shared = self.encodings.batch(texts, [self._padded(r) for r in requests], run)
        return shared if shared is not None else (self.inputs(requests, style), None)

    def _places(
        self, inputs: dict[str, Any], layouts: list[ImageLayout] | None, heard: list[Picture]
    ) -> list[ImageLayout]:
        """Where pictures are, once the model has run."""
        if layouts is None and heard and self.adapter is not None:
            return self.adapter.layouts(dict(inputs), {"image": heard})
        return layouts or []

    def _spent(
        self, run: Run | None, inputs: dict[str, Any], layouts: list[ImageLayout],
        counts: Sequence[int],
    ) -> tuple[list[Cost | None], list[float | None]]:  # fmt: skip
        """What the last prompts cost, and their visual tokens in the mean over layers."""
        costs: list[Cost | None] = [None] * len(counts)
        tokens: list[float | None] = [None] * len(counts)
        shape = self._shape
        if run is not None:
            if shape is not None:
                costs = [*sample_costs(run, new_tokens=counts, shape=shape)]
            tokens = [*run.trace.mean_tokens]
        elif self.adapter is not None:
            if shape is not None:
                costs = [
                    *prompt_costs(self.adapter, inputs, layouts, new_tokens=counts, shape=shape)
                ]
            rows = range(len(counts))
            seen = [sum(len(x.picture.pos) for x in layouts if x.row == i) for i in rows]
            tokens = [float(count) for count in seen]
        return costs, tokens

    def _kept(self, run: Run | None, row: int, request: Request) -> dict[str, Any] | None:
        """Kept patches, and the part of the picture that the model saw where it was cropped."""
        found = kept_map(run, row) if run is not None else None
        if request.image is None:
            return found
        seen = self.seen(request.image.size)
        return {**(found or {}), **seen_of_record(seen)} or None

    def _beyond(self, length: int) -> int | None:
        """Tokens beyond the positions that the decoder was made for; ``None``: there are none.

        Rotary positions go on without an error there, and answers get worse.
        """
        places = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return length - places if isinstance(places, int) and length > places else None

    def seen(self, size: tuple[int, int]) -> Seen:
        """Where the grid of tokens lies on a picture of that width and height."""
        canvas = Canvas.of(size)
        if self.pad:
            canvas.pad_to_square()
        if self.adapter is not None:
            self.adapter.fit(getattr(self.processor, "image_processor", None), canvas)
        return canvas.seen()

    def unseen(self, size: tuple[int, int]) -> str | None:
        """Say what is not seen of a picture of that size, or out of shape, and what to do."""
        said = describe_seen(self.seen(size), size)
        return said and (
            f"{self.name} does not see pictures as they are: the first is {said}. pad (a key of "
            f"the model, --pad) shows it whole in a square, as LLaVA's own evaluation does."
        )

    def _padded(self, request: Request) -> Request:
        if not self.pad or request.image is None:
            return request
        return dataclasses.replace(request, image=pad_to_square(request.image, self._mean))

    @cached_property
    def _mean(self) -> Sequence[float]:
        """The colour that a picture is padded with."""
        mean = getattr(getattr(self.processor, "image_processor", None), "image_mean", None)
        return tuple(mean) if isinstance(mean, list | tuple) and len(mean) == 3 else (0.5,) * 3

    def inputs(self, requests: Sequence[Request], style: str) -> dict[str, Any]:
        """What the model takes for these requests, padded on the left, on its device."""
        texts = [self.markup(r.prompt, style, picture=r.image is not None) for r in requests]
        shown = [self._padded(request).image for request in requests]
        images = [[image] for image in shown if image is not None]
        made = self.processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(made.to(self.model.device, dtype=self.dtype))

    def markup(self, prompt: str, style: str, *, picture: bool) -> str:
        """Put a prompt between the words that the model was trained to see around it."""
        template = self.template
        if template is None and style == "llava15":
            template = self._markup
        if template is None and getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * picture + [{"type": "text", "text": prompt}]
            return self.chat([{"role": "user", "content": content}])
        template = template or PLAIN
        if not picture:
            template = template.replace("<image>\n", "").replace("<image>", "")
        return template.replace("<image>", image_token(self.processor)).replace("{prompt}", prompt)

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """Messages in the words of the processor's chat template, up to where the model answers."""
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    @contextmanager
    def _heard(self, wanted: bool) -> Iterator[list[Picture]]:
        """The pictures that the untouched model encodes meanwhile, where they are wanted."""
        if not wanted or self.adapter is None:
            yield []
            return
        with listening(self.adapter) as heard:
            yield heard

    def length(self, row: Tensor, generation: Mapping[str, Any]) -> int:
        """Tokens up to the first end, which counts."""
        end = generation.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = [end] if isinstance(end, int) else list(end or ())
        hits = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
        return int(hits[0]) + 1 if len(hits) else len(row)
