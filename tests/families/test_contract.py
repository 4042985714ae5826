# SPDX-License-Identifier: Apache-2.0
"""What holds of every family: nothing dropped changes no bit, a dropped token is a hidden one.

Where layers carry a state there is no key to hide: a dropped token was never there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests import tiny as contract
from tests.contract.oracle import TOLERANCE, alive, error, forwards, grown
from tests.families import tiny
from tests.families.oracle import decoder_call, extended, gone_logits, two_kernels
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.find import find_adapter

FAMILIES = tuple(tiny.FAMILIES)
DROPPING = ("random", "divprune", "fastv", "todre")
METHODS = (*DROPPING, "pool")

every_family = pytest.mark.parametrize("family", FAMILIES)


def few(name: str, family: str) -> dict[str, Any]:
    return {"num_keep": 3, "positions": "original", **own(name, family)}


def everything(name: str, family: str) -> dict[str, Any]:
    return {"keep_ratio": 1.0, **own(name, family)}


def own(name: str, family: str) -> dict[str, Any]:
    more = {"tau": 0.0} if name == "todre" else {}
    return {**more, **tiny.FAMILIES[family].params.get(name, {})}


def batch(family: str) -> dict[str, Any]:
    """Left padding, two pictures of two sizes in a row, a row of text alone."""
    return tiny.inputs(family, [[3, "a", 6], [2, "b", 4, "C", 3], [5]])


# Position ids tell the number of a picture among all of the batch.
COUNT_PICTURES_OF_THE_BATCH = ("hunyuan_vl",)

# As BEAMS_BROKEN_UPSTREAM, by code of the family's own.
REPEATED_BY_ITSELF = ("nemotron_h_omni",)
GENERATE = {
    "max_new_tokens": 4,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": list(range(86, 100)),  # placeholders and marks
}


@every_family
@torch.no_grad()
def test_keep_all_is_bit_equal(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    plain, cached = model(**inputs).logits, model.generate(**inputs, **GENERATE)
    for name in METHODS:
        with forwards() as seen, visprune.prune(model, name, **everything(name, family)) as run:
            assert torch.equal(model(**inputs).logits, plain)
            generated = model.generate(**inputs, **GENERATE)
        assert len(seen) == 2  # pictures were found, in forward and in generate
        assert run.trace.image_rows == [0, 1, 1]  # as a person counts them
        assert torch.equal(cached.sequences, generated.sequences)
        for want, got in zip(cached.logits, generated.logits, strict=True):
            assert torch.equal(want, got)
        assert torch.equal(model(**inputs).logits, plain)  # removed


@pytest.mark.parametrize("name", DROPPING)
@every_family
@torch.no_grad()
def test_a_dropped_token_is_hidden_or_absent(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    valid = inputs["attention_mask"].bool()
    with forwards() as seen, visprune.prune(model, name, **few(name, family)):
        logits = model(**inputs).logits
        made = model.generate(**inputs, **GENERATE)
    keep = alive(seen[0])
    eager = models(family, "eager")
    want = gone_logits(family, eager, inputs, keep)
    there = keep[-1] & valid
    plain = model(**inputs, use_cache=False).logits
    kernels = two_kernels(family, eager, inputs, plain)
    assert bool(torch.isfinite(logits[there]).all())
    assert error(logits[there], want[there]) <= TOLERANCE + 2 * kernels < 1e-4
    # Teeth: the untouched model says something else.
    assert error(plain[:2, -1], want[:2, -1]) > 1e-3

    keep = alive(seen[1])
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    longer = extended(inputs, new[:, :-1], find_adapter(model).answer_types)
    want = gone_logits(family, eager, longer, grown(keep, longer["input_ids"].shape[1]))
    start = inputs["input_ids"].shape[1] - 1
    for number, got in enumerate(made.logits):
        assert error(got, want[:, start + number]) <= TOLERANCE + 2 * kernels


@every_family
@torch.no_grad()
def test_a_batch_equals_its_samples_alone(family: str, models: Any) -> None:
    model, rows = models(family), [[3, "a", 6], [2, "b", 4, "C", 3], [5]]
    inputs = tiny.inputs(family, rows)
    valid = inputs["attention_mask"].bool()
    ids = decoder_call(model, inputs).get("position_ids")
    for name in METHODS:
        with visprune.prune(model, name, **few(name, family)) as run:
            together, kept = model(**inputs).logits, run.trace.kept
            alone = []
            for number, row in enumerate(rows):
                sample = tiny.inputs(family, [row])
                if family in COUNT_PICTURES_OF_THE_BATCH:
                    sample["position_ids"] = ids[:, number : number + 1, valid[number]]
                single = model(**sample).logits[0]
                assert error(together[number, valid[number]], single) <= 2e-5
                if number < 2:
                    alone += run.trace.kept
        assert [k.tolist() for k in kept] == [k.tolist() for k in alone]


@every_family
def test_loss_and_gradients_are_finite(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6], [2, "b", 4]])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == tiny.IMAGE, -100)
    with visprune.prune(model, "fastv", num_keep=3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(grad).all()) for grad in found)
    assert sum(bool(grad.any()) for grad in found) > len(found) // 2


@pytest.mark.parametrize("family", [name for name in FAMILIES if tiny.FAMILIES[name].clip])
@pytest.mark.parametrize("name", ["random", "fastv"])
@torch.no_grad()
def test_clips_among_pictures(name: str, family: str, models: Any) -> None:
    model = models(family)
    second = "a" if tiny.FAMILIES[family].mixes else "v"
    inputs = tiny.inputs(family, [[3, second, 2, "v", 4], [2, "v", 3]])
    plain = model(**inputs, use_cache=False).logits
    with visprune.prune(model, name, keep_ratio=1.0):
        assert torch.equal(model(**inputs, use_cache=False).logits, plain)
    with forwards() as seen, visprune.prune(model, name, **few(name, family)) as run:
        logits = model(**inputs).logits
        made = model.generate(**inputs, **GENERATE)
    assert [len(kept) for kept in run.trace.kept] == [3, 3, 3]
    keep = alive(seen[0])
    want = gone_logits(family, models(family, "eager"), inputs, keep)
    there = keep[-1] & inputs["attention_mask"].bool()
    bound = TOLERANCE + 2 * two_kernels(family, models(family, "eager"), inputs, plain)
    assert error(logits[there], want[there]) <= bound < 1e-4
    assert error(made.logits[0], want[:, -1]) <= bound


@pytest.mark.parametrize("family", [name for name in FAMILIES if not tiny.FAMILIES[name].mixes])
def test_pictures_and_clips_of_one_placeholder_are_not_mixed(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 2, "v", 4]])
    with (
        visprune.prune(model, "random", num_keep=3),
        pytest.raises(ConfigError, match="placeholder of pictures"),
    ):
        model(**inputs)


# transformers gives beams of several pictures a sample those of another one.
BEAMS_BROKEN_UPSTREAM = (
    *("glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr", "granite4_vision", "phi4_multimodal"),
)


@pytest.mark.parametrize("family", BEAMS_BROKEN_UPSTREAM)
@torch.no_grad()
def test_beams_with_pictures_in_the_wrong_order_are_refused(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6], [2, "b", 4, "C", 3]])
    with (
        visprune.prune(model, "fastv", num_keep=3),
        pytest.raises(ConfigError, match="lie in two samples"),
    ):
        model.generate(**inputs, num_beams=2, max_new_tokens=2, do_sample=False)


@every_family
@torch.no_grad()
def test_beams_are_those_of_the_untouched_model(family: str, models: Any) -> None:
    one = family in (*BEAMS_BROKEN_UPSTREAM, *REPEATED_BY_ITSELF)
    second = [2, "b", 4] if one else [2, "b", 4, "C", 3]
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6], second])
    options = {**GENERATE, "num_beams": 2, "max_new_tokens": 3}
    want = model.generate(**inputs, **options).sequences
    with visprune.prune(model, "fastv", keep_ratio=1.0) as run:
        assert torch.equal(model.generate(**inputs, **options).sequences, want)
        expected = [0, 1, 2, 3] if one else [0, 1, 2, 2, 3, 3]
        assert run.trace.image_rows == expected


@every_family
def test_the_features_that_wait_go_with_their_tokens(family: str, models: Any) -> None:
    # Teeth of DeepStack: a run that forgets what its tokens are given later is caught above.
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
    with forwards() as seen, visprune.prune(model, "random", num_keep=3), torch.no_grad():
        model(**inputs)
    adds = find_adapter(model).adds_later
    assert bool(seen[0].later) == adds
    for features in seen[0].later.values():
        assert features.shape[1] == seen[0].table.num_slots
        there = features.abs().sum(-1) > 0
        assert torch.equal(there, seen[0].visual_slots())
    assert int(seen[0].visual_slots().sum()) >= 3


@torch.no_grad()
def test_a_choice_at_the_projector_is_by_features_that_wait(models: Any) -> None:
    # Placeholders of Granite 4 Vision are zero there.
    model, kept = models("granite4_vision"), []
    for picture in "BC":
        with visprune.prune(model, "divprune", num_keep=5) as run:
            model(**tiny.inputs("granite4_vision", [[3, picture, 6]]))
            kept += run.trace.kept
    assert kept[0].tolist() != kept[1].tolist()


def test_every_row_of_the_registry_has_a_tiny_model(models: Any) -> None:
    claimed = {models(name).config.model_type for name in FAMILIES}
    assert claimed | set(contract.FAMILIES) == {row.name for row in visprune.list_models("vlm")}


@every_family
@torch.no_grad()
def test_placeholders_that_do_not_fit_are_refused(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
    last = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero().max())
    cut = {**inputs, "input_ids": inputs["input_ids"].clone()}
    cut["input_ids"][0, last] = 7
    with visprune.prune(model, "random", num_keep=3):
        for call in (model, model.generate):
            with pytest.raises(ConfigError, match="it was cut off"):
                call(**cut)
        model(**inputs)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_features_that_are_no_list_of_pictures_are_not_handed_over(
    family: str, models: Any
) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "a", 6]])
    pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    with pytest.raises(UnsupportedModel, match="Pass pixel_values with each prompt"):
        visprune.encode_images(model, **pixels)


@torch.no_grad()
def test_features_of_a_list_are_handed_over(models: Any) -> None:
    model, inputs = models("mistral3"), tiny.inputs("mistral3", [[3, "a", 6]])
    pixels = {k: inputs.pop(k) for k in ("pixel_values", "image_sizes")}
    encoded = visprune.encode_images(model, **pixels)
    with visprune.prune(model, "random", num_keep=3) as run:
        want = model(**inputs, **pixels).logits
        kept = run.trace.kept
        got = model(**inputs, mm_encoder_outputs=encoded.select()).logits
    assert torch.equal(run.trace.kept[0], kept[0])
    assert torch.equal(got, want)
