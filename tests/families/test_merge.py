# SPDX-License-Identifier: Apache-2.0
"""A method that merges equals the decoder on the merged sequence, made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract.oracle import assert_close, error
from tests.families import tiny
from tests.families.oracle import decoder_call, extended, last_states, masks_of
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.backbones.vlm.picture import ImageLayout
from visprune.machine.decoder.hooks import DecoderHooks
from visprune.machine.find import find_adapter

PROMPT = [2, "b", 4, "C", 3]


@contextmanager
def cut_masks(model: Any, masks: list[Tensor | None], stands: Tensor) -> Iterator[None]:
    """Give every layer its own mask of the slots that are left."""
    with ExitStack() as stack:
        for layer, mask in zip(find_adapter(model).layers, masks, strict=True):
            cut = None if mask is None else mask[..., stands, :][..., stands]
            own = {"attention_mask": cut}
            hook = partial(_given, own)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _given(own: dict[str, Any], module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, **own}


def map_of(length: int, layouts: list[ImageLayout], trace: Any) -> tuple[Tensor, Tensor]:
    """What each slot is made of, ``[K, S]``, and the place that it stands at, ``[K]``."""
    slots: list[tuple[int, int, Tensor]] = []
    eye = torch.eye(length)
    visual = {int(p) for layout in layouts for p in layout.positions[layout.picture.free]}
    slots += [(at, at, eye[at]) for at in range(length) if at not in visual]
    for number, layout in enumerate(layouts):
        free = layout.positions[layout.picture.free]
        matrix = trace.whole(number).matrix()[0]
        last = -1
        for row, token in zip(matrix, trace.kept[number].tolist(), strict=True):
            at = int(free[token])
            last = max(last, at)  # slots stay in the selection's order
            slots.append((last, at, row @ eye[free]))
    slots.sort(key=lambda slot: slot[0])
    return torch.stack([slot[2] for slot in slots]), torch.tensor([slot[1] for slot in slots])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_pooling_equals_the_decoder_on_the_means(
    family: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = models(family), tiny.inputs(family, [PROMPT])
    call = decoder_call(model, inputs)
    found: list[list[ImageLayout]] = []
    plain = DecoderHooks._layouts
    monkeypatch.setattr(
        DecoderHooks, "_layouts", lambda self: found.append(plain(self)) or found[-1]
    )
    with visprune.prune(model, "pool", num_keep=4, positions="original") as run:
        pooled = last_states(model, inputs)
    trace = run.trace
    assert any(selection.merges for chosen in trace.chosen for selection in chosen)
    embeds, ids = call["inputs_embeds"], call.get("position_ids")
    made, stands = map_of(embeds.shape[1], found[0], trace)
    short = dict(call, inputs_embeds=(made @ embeds[0])[None], use_cache=False)
    ids = torch.arange(embeds.shape[1])[None] if ids is None else ids
    short["position_ids"] = ids[..., stands]
    short["attention_mask"] = torch.ones(1, len(stands), dtype=torch.long)
    for name in find_adapter(model).by_token:
        if call.get(name) is not None:
            short[name] = call[name][:, stands]
    mask = call.get("visual_pos_masks")
    if mask is not None:
        visual = mask[0, stands]
        whole = embeds.new_zeros(len(call["deepstack_visual_embeds"]), *embeds.shape[1:])
        for number, features in enumerate(call["deepstack_visual_embeds"]):
            whole[number, mask[0]] = features
        short["visual_pos_masks"] = visual[None]
        short["deepstack_visual_embeds"] = [(made @ one)[visual] for one in whole]
    mask = call.get("vision_mask")
    if mask is not None:
        visual, places = mask[0, stands, 0], mask[0, :, 0]
        short["vision_mask"] = visual[None, :, None]
        short["deepstack_features"] = {
            layer: (made @ embeds.new_zeros(embeds.shape[1:]).index_put((places,), one))[visual]
            for layer, one in call["deepstack_features"].items()
        }
    if isinstance(call["attention_mask"], dict):
        short["attention_mask"] = dict.fromkeys(call["attention_mask"])
    eager = models(family, "eager")
    with cut_masks(eager, masks_of(eager, inputs), stands):
        want = find_adapter(eager).language_model(**short).last_hidden_state[0]
    assert_close(pooled[0, stands], want)
    untouched = last_states(model, inputs)
    assert error(pooled[0, -1], untouched[0, -1]) > 1e-3


@pytest.mark.parametrize("family", ["gemma3", "cohere2_vision", "aya_vision", "smolvlm"])
@torch.no_grad()
def test_sizes_weigh_in_windows_and_for_generated_tokens(family: str, models: Any) -> None:
    models(family)
    inputs, new = tiny.inputs(family, [PROMPT]), torch.tensor([[5, 6, 7]])
    found = []
    for attention in ("sdpa", "eager"):
        model = models(family, attention)
        with visprune.prune(model, "pact", layer=1, cutoff=0.7) as run:
            longer = extended(inputs, new)
            whole = model(**longer, use_cache=False).logits
            assert max(float(size.max()) for size in run.trace.sizes) > 1
            output = model(**inputs, use_cache=True)
            given = inputs
            for number in range(new.shape[1]):
                token = new[:, number : number + 1]
                given = extended(given, token)
                ids = {} if "position_ids" not in given else {"position_ids": given["position_ids"]}
                output = model(
                    input_ids=token, attention_mask=given["attention_mask"], use_cache=True,
                    **{CACHE_ARGUMENT: cache_of(output)}, **ids,
                )  # fmt: skip
                assert_close(output.logits[:, -1], whole[:, inputs["input_ids"].shape[1] + number])
        with visprune.prune(model, "pact", layer=1, cutoff=0.7, prop_attn=False):
            assert error(model(**longer, use_cache=False).logits[:, -1], whole[:, -1]) > 1e-3
        found.append(whole)
    assert_close(found[0], found[1])
