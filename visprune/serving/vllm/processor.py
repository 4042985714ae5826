# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of a request: settings checked, placeholders counted, caches told apart.

A mix-in before vLLM's own processor of a family. It runs where a prompt is prepared; the settings
of a picture go with it to the workers, as bytes in a field of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import (
    InputProcessingContext,
    PromptReplacement,
    PromptUpdateDetails,
)

from visprune.catalog import get_method
from visprune.core.method import ModelSpec
from visprune.errors import VispruneError
from visprune.serving.asked import KEYS, METHOD, Asked, read, saved_settings
from visprune.serving.places import spec_of

FIELD = "visprune_asked"


class OwnContext(InputProcessingContext):
    """The context of a processor, which hands on to transformers what is transformers'."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **more: Any) -> dict[str, Any]:
        """The kwargs of server and request, without our settings."""
        return _others(super().get_merged_mm_kwargs(kwargs, **more))


class Prunes:
    """Mix-in of a multimodal processor.

    Attributes:
        kinds: what is pruned: pictures, or clips too.
        apart: why clips are not, in a sentence.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    apart: ClassVar[str] = ""

    info: Any

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(info.ctx, OwnContext):
            own = {f.name: getattr(info.ctx, f.name) for f in fields(info.ctx) if f.init}
            info.ctx = OwnContext(**own)
        super().__init__(info, *args, **kwargs)  # type: ignore[call-arg]
        self.asked({})  # a server whose default cannot be served does not start

    # What a family says -----------------------------------------------------------------------

    def places(self, kind: str, number: int, items: Any, out: Any) -> tuple[Tensor, int]:
        """(t, h, w) of the free tokens ``[N, 3]`` of an item, and how many others it has."""
        raise NotImplementedError  # pragma: no cover - abstract

    @property
    def shows(self) -> frozenset[str]:
        """Layers of the image encoder whose attention is read, as signals name them."""
        return frozenset()

    # Settings ---------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        """The model, as methods know it."""
        return spec_of(self.info.get_hf_config())

    def asked(self, given: Mapping[str, Any]) -> Asked | None:
        """What a request asks for.

        Raises:
            ValueError: what it asks for cannot be done; vLLM answers such a request with 400.
        """
        config = self.info.ctx.model_config.get_multimodal_config()
        if self._whole:
            return None
        try:
            found = read(given, self.default, self.spec, self.shows)
        except VispruneError as error:
            raise ValueError(str(error)) from error
        if found is not None and getattr(config, "video_pruning_rate", None):
            raise ValueError(
                "visprune and --video-pruning-rate both prune; start the server without the latter."
            )
        return found

    @cached_property
    def default(self) -> Mapping[str, Any]:
        """Settings of the server: those that it was started with, or of the model that it serves.

        What :func:`visprune.save_pretrained` wrote names its method, here or on the Hub;
        ``--mm-processor-kwargs '{"visprune": null}'`` serves it dense.
        """
        model = self.info.ctx.model_config
        given = model.get_multimodal_config().mm_processor_kwargs or {}
        if any(key.startswith(METHOD) for key in given):
            return given
        return {**given, **(saved_settings(model.model, model.revision) or {})}

    _whole = False

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Memory is measured with whole pictures: any request may ask for them."""
        self._whole = True
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._whole = False

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Equal settings are equal pictures in every cache, and others are others."""
        given = inputs.hf_processor_mm_kwargs
        found, rest = self.asked(given), _others(given)
        if found is not None:
            self._check_kinds(given, inputs.mm_data_items)
            rest[METHOD] = found.key
        inputs = replace(inputs, hf_processor_mm_kwargs=rest)
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        self._check_known(inputs, hashes, found)
        return hashes

    def _check_known(self, inputs: Any, hashes: Any, found: Asked | None) -> None:
        """Refuse an item that comes by a client's own id alone and is not kept under this hash."""
        if inputs.cache is None:
            return
        for kind, items in inputs.mm_data_items.items():
            for number, own in enumerate(hashes[kind]):
                if items[number] is None and not inputs.cache.is_cached([own])[0]:
                    name = (inputs.mm_uuid_items or {})[kind][number]
                    asked = "whole" if found is None else f"pruned by {found.method}"
                    raise ValueError(
                        f"{kind} {number} came by its id {name!r} alone, and is not kept {asked}: "
                        f"under other settings it is another {kind}, and an id is forgotten when "
                        f"the cache is full. Send the {kind} itself with its id, or ask with the "
                        f"settings that it was sent with."
                    )

    def _check_kinds(self, given: Mapping[str, Any], items: Any) -> None:
        """Refuse a request of its own settings that holds what is not pruned here."""
        made = [kind for kind, x in items.items() if isinstance(x, EmbeddingItems) and len(x)]
        if made:
            raise ValueError(
                f"This request asks for pruning of an {made[0]} that comes as embeddings, of which "
                f"it is not known which token is where. Send the {made[0]} itself."
            )
        others = [
            kind for kind, n in items.get_all_counts().items() if n and kind not in self.kinds
        ]
        if others and any(given.get(key) is not None for key in KEYS):
            raise ValueError(
                f"This request asks for pruning and holds a {others[0]}; of {self.spec.family}, "
                f"{' and '.join(self.kinds)} tokens are pruned. {self.apart}Send it without "
                f"visprune settings, or without the {others[0]}."
            )

    # Pictures ---------------------------------------------------------------------------------

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        out = super()._apply_hf_processor_main(mm_items, _others(hf_kwargs))  # type: ignore[misc]
        found = self.asked(hf_kwargs)
        for kind, count in mm_items.get_all_counts().items():
            if found is not None and kind in self.kinds and count:
                out[_field(kind)] = torch.stack([written(found)] * count)
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        config = super()._get_mm_fields_config(hf_inputs, _others(hf_kwargs))  # type: ignore[misc]
        own = {
            _field(kind): MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
            for kind in self.kinds
            if _field(kind) in hf_inputs
        }
        return {**config, **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        rest = _others(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, rest, out_mm_kwargs)  # type: ignore[misc]
        found = self.asked(hf_processor_mm_kwargs)
        if found is None:
            return updates
        return [
            PromptReplacement(
                modality=update.modality,
                target=update.target,
                replacement=partial(
                    self._shorter, found, update.modality, update.replacement, mm_items,
                    out_mm_kwargs,
                ),
            )
            if update.modality in self.kinds
            else update
            for update in updates
        ]  # fmt: skip

    def _shorter(
        self, found: Asked, kind: str, whole: Any, items: Any, out: Any, number: int
    ) -> Any:
        """The placeholders of an item, as many as will be left of it, and what is around them."""
        made = whole(number)
        full = list(made.full if isinstance(made, PromptUpdateDetails) else made)
        mine = torch.ones(len(full), dtype=torch.bool)
        if isinstance(made, PromptUpdateDetails) and made.is_embed is not None:
            mine = made.is_embed(full)
        ids = mine.nonzero()[:, 0].tolist()
        pos, others = self.places(kind, number, items, out)
        if len(pos) + others != len(ids):
            raise ValueError(
                f"visprune counts {len(pos) + others} tokens of {kind} {number}, vLLM {len(ids)}: "
                f"this version of vLLM lays them out in another way."
            )
        try:
            gone = set(ids[found.count(pos, kind, self.spec) + others :])
        except VispruneError as error:
            raise ValueError(str(error)) from error
        full = [one for place, one in enumerate(full) if place not in gone]
        return replace(made, full=full) if isinstance(made, PromptUpdateDetails) else full


class Refuses(Prunes):
    """Mix-in of the processor of a model that is served but not pruned.

    Attributes:
        reason: why not.
    """

    kinds = ()
    reason: ClassVar[str] = ""

    def asked(self, given: Mapping[str, Any]) -> Asked | None:
        """Nothing.

        Raises:
            ValueError: something is asked for.
        """
        if any({**self.default, **given}.get(key) is not None for key in KEYS):
            raise ValueError(f"visprune does not prune this model in vLLM: {self.reason}.")
        return None


def check_graphs(vllm_config: Any) -> None:
    """Refuse an encoder in CUDA graphs, whose output does not come by where pictures are pruned.

    Raises:
        ValueError: it is asked for.
    """
    if getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False):
        raise ValueError(
            "visprune does not see pictures that are encoded in CUDA graphs: set "
            "cudagraph_mm_encoder to false, or leave the plug-in out (VLLM_PLUGINS=)."
        )


def _field(kind: str) -> str:
    return f"{FIELD}_{kind}"


def _others(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is not ours; an unknown ``visprune_...`` stays out too, and is refused by its reader."""
    return {key: value for key, value in kwargs.items() if not key.startswith(METHOD)}


def written(asked: Asked) -> Tensor:
    """Settings as bytes, uint8 ``[L]``."""
    return torch.tensor(list(json.dumps(asked.method.to_dict()).encode()), dtype=torch.uint8)


def taken(kwargs: dict[str, Any], kind: str) -> list[Asked] | None:
    """Take the settings of each item out of the arguments of a model; ``None``: whole items."""
    field = kwargs.pop(_field(kind), None)
    return None if field is None else [_read_back(bytes(row.tolist())) for row in field]


def encoded_together(vllm_config: Any) -> int:
    """Tokens of whole items that vLLM encodes in one call of a model, at most."""
    return int(vllm_config.scheduler_config.max_num_encoder_input_tokens)


def parts(
    kwargs: Mapping[str, Any], sizes: Sequence[int], most: int,
    flat: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[tuple[slice, dict[str, Any]]]:  # fmt: skip
    """Cut a call of a model into such as vLLM would make of whole items.

    Its budget of an encoder's call counts placeholders, of which pruned items have few. In one call
    they would take memory that the engine, which was measured with whole ones, does not have; and
    beyond a processor's caches each costs more than in several.

    Args:
        kwargs: fields of the items.
        sizes: tokens of each item, before any leaves.
        most: see :func:`encoded_together`; an item that has more is alone.
        flat: rows of each item in the fields where they lie one behind the other; others have one
            entry an item, or are shared by all.

    Yields:
        Which items, and their fields.
    """
    first = 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and sum(sizes[first : last + 1]) <= most:
            last += 1
        own = dict(kwargs)
        for key, value in kwargs.items():
            if flat is not None and key in flat:
                own[key] = value[sum(flat[key][:first]) : sum(flat[key][:last])]
            elif isinstance(value, Sequence) or (isinstance(value, Tensor) and value.ndim > 0):
                own[key] = value[first:last] if len(value) == len(sizes) else value
        yield slice(first, last), own
        first = last


@lru_cache(maxsize=1024)
def _read_back(text: bytes) -> Asked:
    params = json.loads(text)
    return Asked(get_method(params.pop("method"), **params), "")
