# SPDX-License-Identifier: Apache-2.0
"""Several questions about one picture on one cache, each as if it were the only one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.backbones.vlm.base import VLMAdapter
from visprune.errors import UnsupportedModel
from visprune.machine.check.prompts import by_token

__all__ = ["OneCache", "no_turns"]


def no_turns(adapter: VLMAdapter, *, query_aware: bool = True) -> str | None:
    """Why questions cannot share the cache of a family; ``None``: they can.

    Args:
        adapter: of the family.
        query_aware: see :class:`OneCache`; a cache that no question is in is copied, and nothing
            has to be taken back.
    """
    family = adapter.config.model_type
    if not adapter.continues:
        return (
            f"{family} makes another thing of a question behind a picture than of a whole prompt."
        )
    if not query_aware:
        return None
    if adapter.multi_axis_rope:
        return f"{family} counts positions behind a picture on three axes, which is not done here."
    if adapter.recurrent:
        return f"The recurrent layers of {family} cannot be taken back to behind the picture."
    if any(adapter.window(layer) is not None for layer in range(len(adapter.layers))):
        return f"Layers of {family} see a window, and let go of what a question before would see."
    return None


class OneCache:
    """What a prompt leaves, for all questions about its picture.

    A question is put behind the picture, at the positions that it would have in a prompt of its
    own. So the answers to it differ from those of a prompt each by what the cache keeps of the
    picture, and by nothing else.

    Args:
        model: the model; a method may be in force.
        adapter: its adapter, of a family that :func:`no_turns` says nothing against.
        inputs: what the model takes for the first question, one row.
        query_aware: the cache is that of the first question's whole prompt, whose text is taken out
            of it before it or another question is asked; else that of the prompt up to the end of
            the picture, which each question goes on from a copy of: no method has seen any of them.

    Attributes:
        inputs: those of them that the model was given.
    """

    def __init__(
        self, model: Any, adapter: VLMAdapter, inputs: Mapping[str, Any], *,
        query_aware: bool = True,
    ) -> None:  # fmt: skip
        last = {} if adapter.heads_all else {"logits_to_keep": 1}
        ids = inputs["input_ids"][0]
        behind = int((ids == adapter.token_id("image")).nonzero()[-1]) + 1
        self._model, self._copied = model, not query_aware
        self.inputs: dict[str, Any] = dict(inputs)
        if self._copied:
            self.inputs |= {name: inputs[name][:, :behind] for name in by_token(self.inputs)}
        self._cache = cache_of(model(**self.inputs, use_cache=True, **last))
        self._shared = ids[:behind]

    def ask(self, inputs: Mapping[str, Any], generation: Mapping[str, Any]) -> Tensor:
        """Generate an answer.

        Args:
            inputs: what the model would take for the question in a prompt of its own, one row.
            generation: options of ``generate``.

        Returns:
            Ids of the answer, ``[n]``.

        Raises:
            UnsupportedModel: the prompt begins otherwise than the first one.
        """
        texts = {name: inputs[name] for name in by_token(dict(inputs))}
        behind = len(self._shared)
        if not torch.equal(texts["input_ids"][0, :behind], self._shared):
            raise UnsupportedModel(
                "Questions share a cache where all that stands before them is the same; these "
                "prompts differ before the end of the picture. Put the picture before the "
                "question, or give every question a prompt of its own (no turns, query_aware)."
            )
        if self._copied:
            cache = copy.deepcopy(self._cache)
        else:
            cache = self._cache
            cache.crop(behind - cache.get_seq_length())
        ids = self._model.generate(**texts, **{CACHE_ARGUMENT: cache}, **generation)
        return ids[0, texts["input_ids"].shape[1] :]
