# SPDX-License-Identifier: Apache-2.0
"""Where pictures come from: pixels, features encoded earlier, videos; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests import tiny
from tests.contract import oracle
from tests.contract.cases import (
    METHODS,
    NEEDS_CLASS_TOKEN,
    NO_BUDGET,
    batch,
    every_family,
    every_pair,
    few,
    places,
)
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of

PIXELS = ("pixel_values", "image_sizes", "image_grid_thw")
QWENS = ("qwen2_vl", "qwen2_5_vl")
MIXED = [[3, "v", 4, "a", 5], [2, "b", 3], [2, "v", 3]]


def encoded(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pictures through the encoder, and the rest of the inputs."""
    given = {k: v for k, v in inputs.items() if k in PIXELS}
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    return visprune.encode_images(model, **given), rest


@every_pair
@torch.no_grad()
def test_features_encoded_once_give_the_same(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    images, rest = encoded(model, inputs)  # outside any run
    assert len(images) == 3
    with visprune.prune(model, name, **few(name)) as run:
        want, kept = model(**inputs).logits, run.trace.kept
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        inside, _ = encoded(model, inputs)  # inside one
        for source in (images, inside):
            got = model(**rest, mm_encoder_outputs=source.select()).logits
            assert torch.equal(got.nan_to_num(), want.nan_to_num())
            assert all(torch.equal(a, b) for a, b in zip(run.trace.kept, kept, strict=True))
            again = model.generate(**rest, mm_encoder_outputs=source.select(), max_new_tokens=2,
                                   do_sample=False)  # fmt: skip
            assert torch.equal(again, answer)


@every_pair
@torch.no_grad()
def test_encoding_leaves_the_run_as_it_was(name: str, family: str, models: Any) -> None:
    # encode_images wraps and unwraps what the run has wrapped already.
    model, inputs = models(family), batch(family)
    with visprune.prune(model, name, **few(name)) as run:
        want, kept = model(**inputs).logits, run.trace.kept
        encoded(model, inputs)
        got = model(**inputs).logits
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
        assert all(torch.equal(a, b) for a, b in zip(run.trace.kept, kept, strict=True))
    assert not [key for key in vars(model.model) if key.startswith("get_")]


@every_family
@torch.no_grad()
def test_one_picture_asked_about_twice(family: str, models: Any) -> None:
    model = models(family)
    inputs = batch(family, [[3, "a", 6]])
    images, _ = encoded(model, inputs)
    many = batch(family, [[3, "a", 6], [5, "a", 9]])
    rest = {k: v for k, v in many.items() if k != "pixel_values"}
    with visprune.prune(model, "random", num_keep=5) as run:
        want = model(**many).logits
        got = model(**rest, mm_encoder_outputs=images.select([0, 0])).logits
    assert torch.equal(run.trace.kept[0], run.trace.kept[1])
    assert oracle.error(got.nan_to_num(), want.nan_to_num()) <= 1e-5


@every_family
@torch.no_grad()
def test_features_that_carry_no_signals_are_refused(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    images, rest = encoded(model, inputs)
    anonymous = images.select()
    anonymous["image"].pooler_output = [f * 1.5 for f in anonymous["image"].pooler_output]
    with visprune.prune(model, "uniform", num_keep=5) as run:
        with pytest.raises(visprune.ConfigError, match=r"encode_images"):
            model(**rest, mm_encoder_outputs=anonymous)
        assert run.trace.kept == []
        model(**inputs)  # the run is none the worse
        assert len(run.trace.kept) == 3


@every_family
@torch.no_grad()
def test_copies_of_features_are_known_by_their_values(family: str, models: Any) -> None:
    """A clone, and what went through another dtype: they carry nothing but values."""
    model, inputs = models(family), batch(family)
    images, rest = encoded(model, inputs)
    copied = images.select()
    first, *rest_of = copied["image"].pooler_output
    copied["image"].pooler_output = [first.double().float(), *(f.clone() for f in rest_of)]
    with visprune.prune(model, "uniform", num_keep=5) as run:
        want = model(**rest, mm_encoder_outputs=images.select()).logits
        kept = run.trace.kept
        got = model(**rest, mm_encoder_outputs=copied).logits
        assert all(torch.equal(a, b) for a, b in zip(run.trace.kept, kept, strict=True))
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@torch.no_grad()
def test_signals_that_were_not_kept_are_asked_for(models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with visprune.prune(model, "uniform", num_keep=5):
        output = model.model.get_image_features(pixel_values=inputs["pixel_values"])
    message = r"visionzip reads ClsAttention.* of the image encoder.*encode_images"
    run = visprune.prune(model, "visionzip", num_keep=5)
    with run, pytest.raises(visprune.ConfigError, match=message):
        model(**rest, mm_encoder_outputs={"image": output})


def test_encode_images_reads_its_input(models: Any) -> None:
    with pytest.raises(visprune.ConfigError, match="pixel_values; got image_sizes"):
        visprune.encode_images(models("llava_next"), image_sizes=torch.tensor([[24, 48]]))
    with pytest.raises(visprune.UnsupportedModel, match="llava, llava_next, qwen2_vl"):
        visprune.encode_images(torch.nn.Linear(2, 2), pixel_values=torch.zeros(1))


# Videos --------------------------------------------------------------------------------------


CLIPPED = [
    name
    for name in METHODS
    if name not in NEEDS_CLASS_TOKEN and (name not in NO_BUDGET or name == "keep_all")
]


@pytest.mark.parametrize("family", QWENS)
@pytest.mark.parametrize("name", CLIPPED)
@torch.no_grad()
def test_videos_have_a_budget_each(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, MIXED)
    untouched = model(**inputs).logits
    with visprune.prune(model, name, **few(name, 10_000)):
        assert torch.equal(model(**inputs).logits, untouched)
    with oracle.forwards() as seen, visprune.prune(model, name, **few(name, 4)) as run:
        options = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [90, 91, 92, 93]}
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    # Images first, then videos; a video of four frames has 2 x 2 x 2 tokens.
    assert run.trace.num_tokens == [12, 12, 8, 8]
    assert run.trace.image_rows == [0, 1, 0, 2]
    if name == "keep_all":
        return
    assert all(1 <= len(kept) <= 4 for kept in run.trace.kept)
    for kept, pos in list(zip(run.trace.kept, run.trace.pos, strict=True))[2:]:
        want = torch.stack([kept // 4, kept % 4 // 2, kept % 2], 1)
        assert torch.equal(pos, want)
    if name == "pool":
        # Two frames of 2 x 2: one square cell in each is the largest grid of that aspect.
        assert run.trace.kept[2].tolist() == [0, 4]
        return
    assert [len(kept) for kept in run.trace.kept] == [4] * 4
    keep, length = oracle.alive(seen[0]), inputs["input_ids"].shape[1]
    longer = oracle.extended(inputs, out.sequences[:, length : length + 1])
    want = oracle.hidden_logits(model, longer, oracle.grown(keep, length + 1))
    oracle.assert_close(out.logits[0], want[:, length - 1])
    oracle.assert_close(out.logits[1], want[:, length])


# Layouts -------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_protected_tokens_stay(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with oracle.forwards() as seen, visprune.prune(model, "fastv", num_keep=1):
        model(**inputs)
    keep = oracle.alive(seen[0])[-1]
    found = places(family, inputs)
    assert any(len(fixed) for _, _, fixed in found) == (family == "llava_next")
    for row, free, fixed in found:
        assert bool(keep[row, fixed].all())
        assert int(keep[row, free].sum()) == 1
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.IMAGE)
    assert bool(keep[text].all())


@every_family
@pytest.mark.parametrize("name", ["todre", "fastv", "pyramiddrop", "keep_all"])
@torch.no_grad()
def test_text_alone_is_untouched(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[5], [9]])
    want = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with visprune.prune(model, name, **few(name)) as run:
        assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), answer)
    assert run.trace.kept == []
    assert run.trace.tokens_per_layer == []


@every_family
@torch.no_grad()
def test_a_cache_of_text_can_go_on_with_a_picture(family: str, models: Any) -> None:
    # The system prompt was read before the method was put on.
    model = models(family)
    whole = batch(family, [[4, "a", 6]])
    head = {key: whole[key][:, :4] for key in ("input_ids", "attention_mask")}
    tail = {**whole, "input_ids": whole["input_ids"][:, 4:]}
    if family in QWENS:
        tail["mm_token_type_ids"] = whole["mm_token_type_ids"][:, 4:]
        ids = model.model.get_rope_index(
            whole["input_ids"], mm_token_type_ids=whole["mm_token_type_ids"],
            image_grid_thw=whole["image_grid_thw"], attention_mask=whole["attention_mask"],
        )[0]  # fmt: skip
        head["position_ids"], tail["position_ids"] = ids[..., :4], ids[..., 4:]
        whole["position_ids"] = ids
    cache = cache_of(model(**head, use_cache=True))
    with oracle.forwards() as seen, visprune.prune(model, "fastv", num_keep=5):
        got = model(**tail, **{CACHE_ARGUMENT: cache}).logits
        logical = cache.get_seq_length()
    assert logical == whole["input_ids"].shape[1]
    part = oracle.alive(seen[0])
    keep = [torch.cat([torch.ones(1, 4, dtype=torch.bool), one], 1) for one in part]
    want = oracle.hidden_logits(model, whole, keep)[:, 4:]
    oracle.assert_close(got[part[-1]], want[part[-1]])


@every_family
@torch.no_grad()
def test_a_mask_of_the_wrong_length_is_refused(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    with visprune.prune(model, "uniform", num_keep=4) as run:
        cache = cache_of(model(**inputs, use_cache=True))
        length = inputs["input_ids"].shape[1]
        stored = run.trace.stored_per_layer[0][0]
        # This mask counts what is stored, not what was seen.
        short = torch.ones(1, stored + 1, dtype=torch.long)
        step = {**oracle.step(model, inputs, torch.tensor([[5]])), "attention_mask": short}
        with pytest.raises(visprune.ConfigError, match=f"mask of {length + 1}"):
            model(**step, **{CACHE_ARGUMENT: cache})


@every_family
@torch.no_grad()
def test_placeholders_and_pictures_must_match(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    images, rest = encoded(model, inputs)
    with (
        visprune.prune(model, "uniform", num_keep=4),
        pytest.raises(
            (visprune.ConfigError, ValueError, RuntimeError),
            match=r"(?i)(placeholder|tokens|match)",
        ),
    ):
        model(**rest, mm_encoder_outputs=images.select([0, 0]))
