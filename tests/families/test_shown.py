# SPDX-License-Identifier: Apache-2.0
"""What families show of their image encoder: its signals, by the patches of each token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract.oracle import error
from tests.contract.test_signals import looked
from tests.families import tiny
from visprune.backbones.cost.attention import find_attention
from visprune.backbones.hf.features import entries
from visprune.backbones.vlm.known import CLASS_TOKEN, FIRST, READ
from visprune.core import Site
from visprune.core.signals import ClsAttention, EncoderFeatures, EncoderKeys, ReceivedAttention
from visprune.errors import UnsupportedModel
from visprune.machine.encoder.tap import listening
from visprune.machine.find import find_adapter

PACKED = ("llava_onevision", "llava_next_video")
# The first families have tests of their own.
SHOWN = tuple(name for name in READ if name not in (*FIRST, *PACKED))
ROWS = [[3, "a", 6], [2, "B", 4]]
every_shown = pytest.mark.parametrize("family", SHOWN)


def encoded(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Features of all tokens of a call, one behind the other."""
    found: list[Any] = []
    get = model.model.get_image_features

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(get(*args, **kwargs))
        return found[-1]

    model.model.get_image_features = noted
    try:
        model(**inputs)
    finally:
        del model.model.get_image_features
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in entries(found[0])])


@contextmanager
def changed(block: Any, number: int, token: int) -> Iterator[None]:
    """Let a layer say something else of one token; what collects its outputs sees that too."""
    forward = block.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[number, token] = hidden[number, token].flip(0) + 1.0
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block.forward = other
    try:
        yield
    finally:
        del block.forward


@every_shown
@torch.no_grad()
def test_a_patch_changes_the_tokens_that_are_made_of_it(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, ROWS)
    adapter = find_adapter(model)
    with listening(adapter) as heard:
        before = encoded(model, inputs)
    source = torch.cat([picture.source.reshape(len(picture.free), -1) for picture in heard])
    assert len(source) == len(before)
    assert sorted(source.flatten().tolist()) == list(range(source.numel()))  # each patch once
    encoder = adapter.read_encoder
    block = adapter.encoder_block(adapter.encoder_end)
    for patch in (0, 1, 7, encoder.patches - 1, encoder.patches + 14, source.numel() - 2):
        number, place = divmod(patch, encoder.patches)
        with changed(block, number, encoder.prefix + place):
            after = encoded(model, inputs)
        moved = (after - before).abs().amax(-1) > 1e-6
        assert torch.equal(moved, (source == patch).any(-1))


def attention_maps(model: Any, inputs: dict[str, Any], layer: int) -> Tensor:
    """``[P, H, T, T]`` of an encoder layer, as eager attention has it."""
    block = find_adapter(model).read_encoder.layers[layer]
    attention, found = find_attention(block), []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if hasattr(attention, "fused_attn"):  # of timm
            patch.setattr(attention, "fused_attn", False)
            handle = attention.attn_drop.register_forward_hook(lambda m, a, out: found.append(out))
        else:
            handle = attention.register_forward_hook(lambda m, a, out: found.append(out[1]))
        model(**inputs)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_shown
def test_signals_are_means_over_the_patches_of_a_token(
    family: str, attention: str, models: Any
) -> None:
    model, eager = models(family, attention), models(family, "eager")
    inputs = tiny.inputs(family, [[3, "a", 6], [2, "b", 4]])  # of one size
    adapter = find_adapter(eager)
    layer, prefix = adapter.encoder_end, adapter.encoder_prefix
    with torch.no_grad(), listening(adapter) as heard:
        eager(**inputs)
    source = [picture.source.reshape(len(picture.free), -1) for picture in heard]
    maps = attention_maps(eager, inputs, layer)
    received = maps.mean(2)[..., prefix:].transpose(1, 2).flatten(0, 1)  # [P * N, H]
    got = flat(looked(model, inputs, ReceivedAttention("feature"), Site.projector()))
    want = torch.cat([received[one].mean(1) for one in source])  # [n, H]
    assert torch.allclose(got, want, atol=1e-5)
    if family not in CLASS_TOKEN:
        with pytest.raises(UnsupportedModel, match="has no class token"):
            looked(model, inputs, ClsAttention("feature"), Site.projector())
        return
    row = maps[:, :, 0, prefix:].transpose(1, 2).flatten(0, 1)
    got = flat(looked(model, inputs, ClsAttention("feature"), Site.projector()))
    want = torch.cat([row[one].mean(1) for one in source])
    assert torch.allclose(got, want, atol=1e-5)


def flat(signal: Any) -> Tensor:
    """A signal of pictures of one size or of several, tokens first: ``[n, H]``."""
    return torch.cat([one.movedim(-1, 0) for one in signal])


@every_shown
def test_features_and_keys_of_the_encoder(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
    features = looked(model, inputs, EncoderFeatures("last"), Site.projector())[0]
    keys = looked(model, inputs, EncoderKeys("last"), Site.projector())[0]
    adapter = find_adapter(model)
    found: list[Tensor] = []
    block = adapter.encoder_block(adapter.encoder_layer("last"))
    handle = block.register_forward_hook(
        lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), listening(adapter) as heard:
        model(**inputs)
    handle.remove()
    patches = found[0][:, adapter.encoder_prefix :].flatten(0, 1)
    source = torch.cat([one.source.reshape(len(one.free), -1) for one in heard])
    assert torch.allclose(features, patches[source].mean(1), atol=1e-6)
    assert keys.shape[0] == len(source)
    assert bool(torch.isfinite(keys).all())


@torch.no_grad()
def test_a_method_of_the_class_token_runs_where_there_is_one(models: Any) -> None:
    for family in set(CLASS_TOKEN) - set(FIRST):
        model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
        with visprune.prune(model, "visionzip", num_keep=4) as run:
            model(**inputs)
            assert len(run.kept[0]) == 4


WHY = {
    "smolvlm": "no class token",
    "qwen3_vl": "packs the patches of all pictures into one sequence",
    "aria": "learned queries, and no patches",
    "mistral3": "which of the tokens of mistral3 is which patch of its encoder is not known",
    "granite4_vision": "several look at all patches of one window",
}


@pytest.mark.parametrize("family", WHY)
def test_a_refusal_says_why_and_names_what_needs_none(family: str, models: Any) -> None:
    with pytest.raises(UnsupportedModel, match=WHY[family]) as caught:
        visprune.prune(models(family), "visionzip", num_keep=4)
    fits = str(caught.value).partition("Methods that fit it: ")[2]
    assert "divprune" in fits
    assert "fastv" in fits
    assert "visionzip" not in fits


def test_tokens_do_not_leave_inside_an_encoder_that_is_only_read(models: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"a part of the encoder itself.*the whole grid"):
        visprune.prune(models("ovis2"), "tome", r=2)


@contextmanager
def features_of_a_layer(model: Any) -> Iterator[list[Tensor]]:
    """What the encoder's layer that is read gives, patches alone, ``[P, N, D]``."""
    adapter, found = find_adapter(model), []
    blocks, prefix = adapter.encoder_blocks(adapter.encoder_end), adapter.encoder_prefix

    def left(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(hidden[:, prefix:])

    handles = [block.register_forward_hook(left) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("picture", "aB")
@pytest.mark.parametrize("family", [*PACKED, "llava_onevision_shrunk"])
@torch.no_grad()
def test_signals_of_packed_crops_are_packed_as_features_are(
    family: str, picture: str, models: Any
) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, picture, 6]])
    got = looked(model, inputs, EncoderFeatures("feature"), Site.projector())
    with features_of_a_layer(model) as found, listening(find_adapter(model)) as heard:
        model(**inputs)
    options: dict[str, Any] = {"vision_feature_select_strategy": "full"}
    if family != "llava_next_video":
        options = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    newline = torch.zeros(found[0].shape[-1])
    packed = model.model.pack_image_features(
        [found[0]], inputs["image_sizes"], image_newline=newline, **options
    )[0]
    assert error(got[0], packed[0][heard[0].free]) < 1e-5
    assert (heard[0].weight is not None) == family.endswith("_shrunk")


@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_signals_of_clips_are_pooled_as_features_are(family: str, models: Any) -> None:
    model, core = models(family), models(family).model
    inputs = tiny.inputs(family, [[3, "v", 6], [2, "v", 4]])
    got = looked(model, inputs, EncoderFeatures("feature"), Site.projector())
    with features_of_a_layer(model) as found:
        model(**inputs)
    pool = core.apply_pooling if family == "llava_onevision" else core.vision_resampler
    want = pool(found[0]).reshape(2, -1, found[0].shape[-1])
    assert torch.allclose(torch.cat(list(got)).reshape(want.shape), want, atol=1e-5)


@pytest.mark.parametrize("family", ["video_llava", "perception_lm"])
@torch.no_grad()
def test_signals_of_frames_are_those_of_their_encoder(family: str, models: Any) -> None:
    model, adapter = models(family), find_adapter(models(family))
    inputs = tiny.inputs(family, [[3, "v", 6], [2, "v", 4]])
    got = looked(model, inputs, EncoderFeatures("feature"), Site.projector())
    with features_of_a_layer(model) as found:
        model(**inputs)
    want = found[0][:, adapter.read_encoder.blocks()].mean(2)
    want = want.reshape(2, -1, want.shape[-1])
    assert torch.allclose(torch.cat(list(got)).reshape(want.shape), want, atol=1e-5)
    with visprune.prune(model, "visionzip", num_keep=4) as run:
        model(**inputs)
    assert [len(kept) for kept in run.trace.kept] == [4, 4]


@pytest.mark.parametrize("family", [*PACKED, "llava_onevision_shrunk"])
@torch.no_grad()
def test_a_patch_changes_the_tokens_that_are_packed_of_it(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6], [2, "B", 4]])
    adapter = find_adapter(model)
    with listening(adapter) as heard:
        before = encoded(model, inputs)
    free = torch.cat([picture.free for picture in heard])
    rows = [_weights(picture) for picture in heard]
    block, patches = adapter.encoder_block(adapter.encoder_end), adapter.read_encoder.patches
    for patch in (0, 20, 40, 80, 130, 200, 280):
        number, place = divmod(patch, patches)
        with changed(block, number, adapter.encoder_prefix + place):
            after = encoded(model, inputs)
        moved = (after - before).abs().amax(-1)[free] > 1e-6
        want = torch.cat([((source == patch) & (part > 1e-6)).any(-1) for source, part in rows])
        assert torch.equal(moved, want)


def _weights(picture: Any) -> tuple[Tensor, Tensor]:
    """The patches of each free token, and how much each of them counts."""
    source = picture.source.reshape(len(picture.pos), -1)
    weight = picture.weight
    return source, torch.ones(source.shape) if weight is None else weight
