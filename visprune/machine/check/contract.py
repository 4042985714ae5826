# SPDX-License-Identifier: Apache-2.0
"""What is promised of a pruned model, compared on one prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import cache_of, new_cache
from visprune.backbones.vlm.base import VLMAdapter
from visprune.catalog import get_method
from visprune.errors import ConfigError, UnsupportedKernel, VispruneError, first_line
from visprune.machine.check.absent import absent_logits
from visprune.machine.check.attach import Attached, attached, probe_for
from visprune.machine.check.hide import hiding
from visprune.machine.check.locate import first_difference
from visprune.machine.check.prompts import Inputs, extended, padded, special_ids, together
from visprune.machine.check.report import Row, difference, rounding

NEW_TOKENS = 4
# What a model says in whose calls something is wrong.
BREAKS = (
    *(VispruneError, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError),
)
_ROOM = 2**28  # logits that are held at once; of longer prompts, the last tokens are compared
_LAST = 64


class Contract:
    """The promises, on one model and one prompt; each is run when it is asked for.

    Args:
        adapter: the model family, on an untouched model in eval mode.
        inputs: what the model takes.
    """

    def __init__(self, adapter: VLMAdapter, inputs: Inputs) -> None:
        self.adapter, self.model, self.inputs = adapter, adapter.model, inputs
        weight: Any = adapter.head.weight
        self.dtype: torch.dtype = weight.dtype
        self.probe = probe_for(adapter)
        self._special = special_ids(adapter)
        width = int(weight.shape[0])
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        long = inputs["input_ids"].numel() * width > _ROOM
        self.few: Inputs = {"logits_to_keep": _LAST} if long and takes else {}

    # What is run -----------------------------------------------------------------------------

    def logits(self, inputs: Inputs) -> Tensor:
        """Logits ``[B, T, V]`` of the last T tokens, all where there is room."""
        return self.model(**inputs, **self.few, use_cache=False).logits

    def answered(self) -> tuple[Tensor, list[Tensor]]:
        """Tokens ``[B, n]`` that are generated, and the logits of each step."""
        options = {"temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
        made = self.model.generate(
            **self.inputs, **options, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True,
            output_logits=True, return_dict_in_generate=True, suppress_tokens=self._special,
        )  # fmt: skip
        return made.sequences[:, -len(made.logits) :], list(made.logits)

    @cached_property
    def whole(self) -> tuple[Tensor, int]:
        """Logits of the untouched model, and bytes of its cache."""
        return self._with_cache()

    @cached_property
    def pruned(self) -> tuple[Tensor, int, Attached]:
        """The same under the probe, and what it did.

        Raises:
            ConfigError: no picture was found.
        """
        with attached(self.adapter, self.probe) as found:
            logits, held = self._with_cache()
        if not found.forwards:
            raise ConfigError("no picture was found in this prompt, so nothing was dropped.")
        return logits, held, found

    def _with_cache(self) -> tuple[Tensor, int]:
        output = self.model(**self.inputs, **self.few, use_cache=True)
        if cache_of(output) is None:  # some decoders make none by themselves
            own = new_cache(self.adapter.text_config)
            output = self.model(**self.inputs, **self.few, **own, use_cache=True)
        return output.logits, cache_bytes(cache_of(output))

    @cached_property
    def whole_answer(self) -> tuple[Tensor, list[Tensor]]:
        """What the untouched model generates."""
        return self.answered()

    @cached_property
    def pruned_answer(self) -> tuple[Tensor, list[Tensor]]:
        """What it generates under the probe."""
        with attached(self.adapter, self.probe):
            return self.answered()

    @cached_property
    def whole_longer(self) -> Tensor:
        """Logits of the untouched model of the prompt with its answer."""
        return self.logits(self._longer(self.whole_answer[0][:, :-1]))

    @cached_property
    def pruned_longer(self) -> Tensor:
        """The same under the probe."""
        with attached(self.adapter, self.probe):
            return self.logits(self._longer(self.pruned_answer[0][:, :-1]))

    def _longer(self, answer: Tensor) -> Inputs:
        """The prompt with an answer."""
        return extended(self.inputs, answer, self.adapter.answer_types)

    def effect(self, there: Any = slice(None)) -> float:
        """How far dropping moves the logits of the prompt's tokens ``there``, or of all."""
        return difference(self.pruned[0][there], self.whole[0][there])

    # What is promised ------------------------------------------------------------------------

    def keep_all(self) -> Row:
        """Nothing dropped is the untouched model, in a forward and in ``generate``."""
        with attached(self.adapter, get_method("keep_all")):
            logits, _ = self._with_cache()
            tokens, steps = self.answered()
        want_tokens, want = self.whole_answer
        found = difference(logits[self._valid(logits)], self.whole[0][self._valid(logits)])
        found = max(found, *(difference(a, b) for a, b in zip(steps, want, strict=True)))
        same = found == 0 and torch.equal(tokens, want_tokens)
        return Row("keep all = untouched", found, rounding(self.dtype), "same bits" * same)

    def hidden(self) -> Row:
        """A dropped token is a hidden one, layer by layer; in a state, it was never there."""
        if self.adapter.recurrent:
            return self._absent()
        name = "drop = hide"
        logits, _, found = self.pruned
        keep = found.alive(-1)
        everything = [torch.ones_like(one) for one in keep]
        try:
            with hiding(self.adapter.layers, everything):
                plain = self.logits(self.inputs)
            with hiding(self.adapter.layers, keep):
                want = self.logits(self.inputs)
        except UnsupportedKernel as error:
            return Row(name, None, note=str(error))
        valid = self._valid(logits)
        # An untouched model whose kernel is given a mask says as much more or less.
        allowed = rounding(self.dtype) + 2 * difference(plain[valid], self.whole[0][valid])
        there = valid & keep[-1].to(valid.device)[:, -logits.shape[1] :]
        effect = difference(self.whole[0][there], want[there])
        row = Row(name, difference(logits[there], want[there]), allowed, self._depths, effect)
        if row.holds is False:
            cause = first_difference(self.adapter, self.inputs, self.probe, keep, row.allowed)
            return Row(name, row.found, allowed, cause, effect)
        return row

    def _absent(self) -> Row:
        """A dropped token was never there."""
        name = "drop = absent"
        if self.inputs["attention_mask"].dim() != 2:
            return Row(name, None, note="the attention mask is not a 2-D padding mask")
        logits, _, found = self.pruned
        keep, last = found.alive(-1), logits.shape[1]
        everything = [torch.ones_like(one) for one in keep]
        plain = absent_logits(self.adapter, self.inputs, everything)[:, -last:]
        want = absent_logits(self.adapter, self.inputs, keep)[:, -last:]
        valid = self._valid(logits)
        # Row by row, an untouched model sums up in other pieces.
        allowed = rounding(self.dtype) + 2 * difference(plain[valid], self.whole[0][valid])
        there = valid & keep[-1].to(valid.device)[:, -last:]
        effect = difference(self.whole[0][there], want[there])
        return Row(name, difference(logits[there], want[there]), allowed, self._depths, effect)

    def cached(self) -> Row:
        """Tokens generated from the cache are those of one forward."""
        found = self._answer_error(self.pruned_answer[1], self.pruned_longer)
        noise = self._answer_error(self.whole_answer[1], self.whole_longer)
        allowed = rounding(self.dtype) + 2 * noise
        effect = self.effect((slice(None), -1))
        return Row("generate = one forward", found, allowed, "with cache", effect)

    def batched(self) -> Row:
        """Prompts of two lengths in a padded batch are what they are alone."""
        name = "batch = singles"
        if self.inputs["attention_mask"].dim() != 2:
            return Row(name, None, note="the attention mask is not a 2-D padding mask")
        with attached(self.adapter, self.probe):
            found = self._batch_error(self.pruned_answer[0], self.pruned[0], self.pruned_longer)
        noise = self._batch_error(self.whole_answer[0], self.whole[0], self.whole_longer)
        effect = self.effect(self._valid(self.whole[0]))
        note = "padded on the left"
        if noise > 10 * rounding(self.dtype):
            note = f"the untouched model itself differs by {noise:.1e}"
        return Row(name, found, rounding(self.dtype) + 2 * noise, note, effect)

    # Parts -----------------------------------------------------------------------------------

    @property
    def _depths(self) -> str:
        deep = [s.site for s in self.probe.schedule(self.adapter.spec) if s.site.kind == "decoder"]
        return f"at the projector and decoder layer {deep[0].layer}" if deep else ""

    def _valid(self, logits: Tensor) -> Tensor:
        """Which of the tokens whose logits are compared are no padding, ``[B, T]``."""
        mask = self.inputs["attention_mask"]
        if mask.dim() != 2:
            return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        return mask[:, -logits.shape[1] :].bool().to(logits.device)

    def _answer_error(self, steps: list[Tensor], longer: Tensor) -> float:
        count = len(steps)
        pairs = zip(steps, longer[:, -count:].unbind(1), strict=True)
        return max(difference(got, want.to(got)) for got, want in pairs)

    def _batch_error(self, tokens: Tensor, short: Tensor, longer: Tensor) -> float:
        """The prompt and the prompt with its answer in one batch, against each alone."""
        more = tokens[:, :-1]
        token = int(more[0, -1])  # text
        first = padded(self.inputs, more.shape[1], token)
        logits = self.logits(together(first, self._longer(more), self.adapter.packed))
        rows = short.shape[0]
        valid = self._valid(short)
        late = longer[:, -short.shape[1] :]
        grown = self._longer(more)["attention_mask"][:, -late.shape[1] :].bool()
        got_short = logits[:rows, -short.shape[1] :]
        got_late = logits[rows:, -late.shape[1] :]
        there = grown.to(late.device)
        return max(
            difference(got_short[valid], short[valid]), difference(got_late[there], late[there])
        )


def cache_bytes(cache: Any) -> int:
    """Bytes of keys, values and states in a cache."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            for part in held.values() if isinstance(held, dict) else (held,):
                if isinstance(part, Tensor):
                    total += part.numel() * part.element_size()
    return total


def tried(name: str, promise: Callable[[], Row]) -> Row:
    """A promise, broken where it cannot be run at all."""
    try:
        return promise()
    except torch.OutOfMemoryError:  # says nothing of what is promised
        raise
    except BREAKS as error:
        return Row(name, float("inf"), 0.0, first_line(error))
