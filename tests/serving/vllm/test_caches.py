# SPDX-License-Identifier: Apache-2.0
"""What is kept between requests is what was asked for; what was thrown out is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.multimodal.processing import ProcessorInputs

from tests.serving.vllm.asking import picture, request, sampling
from visprune import __version__
from visprune.serving import asked as asked_module
from visprune.serving.vllm.processor import parts

A = {"visprune": "todre", "visprune_num_keep": 32}
SETTINGS: list[dict[str, Any]] = [
    {}, A, {**A, "visprune_num_keep": 33}, {"visprune": "divprune", "visprune_num_keep": 32},
    {**A, "visprune_params": {"objective": "max_sum"}},
]  # fmt: skip


def encoded(model: Any) -> int:
    """Pictures that a worker has encoded since this was called first."""
    if not hasattr(model, "encoded_pictures"):
        stock, model.encoded_pictures = model.embed_multimodal, 0

        def counting(**kwargs: Any) -> Any:
            found = stock(**kwargs)
            model.encoded_pictures += len(found)
            return found

        model.embed_multimodal = counting
    return int(model.encoded_pictures)


def asked(engine: Any, *requests: dict[str, Any]) -> list[Any]:
    found = engine.generate(list(requests), sampling(), use_tqdm=False)
    return [(len(one.prompt_token_ids), list(one.outputs[0].token_ids)) for one in found]


def test_a_request_again_encodes_nothing_and_other_settings_are_other_pictures(
    engines: Callable[..., Any],
) -> None:
    """By the encoder's cache alone: no prefix of a prompt is kept."""
    engine, own = engines("llava"), [picture(200, 201)]
    (before,) = engine.apply_model(encoded)
    requests = [request("llava", own, one) for one in SETTINGS]
    first = asked(engine, *requests)
    assert [length for length, _ in first] == [585, 41, 42, 41, 41]
    assert engine.apply_model(encoded) == [before + len(SETTINGS)]
    assert asked(engine, *requests[::-1]) == first[::-1]
    # Equal settings in other words: a parameter's own default.
    same = {**A, "visprune_params": {"objective": "k_center", "stage2": False}}
    assert asked(engine, request("llava", own, same)) == [first[1]]
    assert engine.apply_model(encoded) == [before + len(SETTINGS)]


def encoder_calls(model: Any) -> list[int]:
    """Pictures in each call of a worker's encoder since this was called first."""
    if not hasattr(model, "encoder_calls"):
        model.encoder_calls = []
        model.vision_tower.register_forward_pre_hook(
            lambda module, args: model.encoder_calls.append(len(args[0]))
        )
    return list(model.encoder_calls)


def test_pruned_pictures_are_encoded_as_many_at_once_as_whole_ones(
    engines: Callable[..., Any],
) -> None:
    """Memory was measured for those; by their placeholders all of them would fit into a call."""
    engine = engines("llava")  # 1,800 tokens a call, 576 a picture
    before = len(engine.apply_model(encoder_calls)[0])
    few = {"visprune": "uniform", "visprune_num_keep": 8}
    requests = [request("llava", [picture(112, 112, n)], few) for n in range(5)]
    first = asked(engine, *requests)
    assert engine.apply_model(encoder_calls)[0][before:] == [3, 2]
    assert asked(engine, *requests) == first
    assert len(engine.apply_model(encoder_calls)[0]) == before + 2


def test_fields_of_a_call_are_cut_with_their_items() -> None:
    """Rows one behind the other, an entry an item, shared by all; what is too long is alone."""
    fields = {"rows": torch.arange(9), "grids": torch.arange(3), "names": ["a", "b", "c"],
              "shared": torch.tensor(7), "all": [1, 2], "id": 5}  # fmt: skip
    found = [
        (own, [part["rows"].tolist(), part["grids"].tolist(), part["names"]])
        for own, part in parts(fields, [4, 3, 9], 7, {"rows": [2, 3, 4]})
        if (part["shared"], part["all"], part["id"]) == (7, [1, 2], 5)
    ]
    assert found == [
        (slice(0, 2), [[0, 1, 2, 3, 4], [0, 1], ["a", "b"]]),
        (slice(2, 3), [[5, 6, 7, 8], [2], ["c"]]),
    ]


def test_a_clients_own_id_is_one_picture_for_each_of_its_settings(
    engines: Callable[..., Any],
) -> None:
    engine, own = engines("llava"), [picture(200, 200)]
    named = [{**request("llava", own, one), "multi_modal_uuids": {"image": ["mine"]}}
             for one in SETTINGS]  # fmt: skip
    before = engine.apply_model(encoded)[0]
    first = asked(engine, *[request("llava", own, one) for one in SETTINGS])
    assert asked(engine, *named) == first
    made = engine.apply_model(encoded)[0]
    # The id alone, without the picture.
    alone = [{**one, "multi_modal_data": {"image": [None]}} for one in named]
    assert asked(engine, *alone) == first
    assert engine.apply_model(encoded)[0] == made <= before + 2 * len(SETTINGS)
    other = {**alone[1], "mm_processor_kwargs": {**A, "visprune_num_keep": 7}}
    with pytest.raises(ValueError, match="image 0 came by its id 'mine' alone, and is not kept pr"):
        asked(engine, other)
    whole = {**alone[0], "multi_modal_uuids": {"image": ["theirs"]}}
    with pytest.raises(ValueError, match=r"its id 'theirs' alone, and is not kept whole: .*Send"):
        asked(engine, whole)
    assert asked(engine, *alone) == first


def test_another_version_is_another_picture(
    engines: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash that every cache goes by, outside of this process too."""
    engine, own = engines("llava"), [picture(200, 200)]

    def hashed(settings: dict[str, Any]) -> str:
        processor = engine.llm_engine.renderer.get_mm_processor()
        items = processor.info.parse_mm_data({"image": own})
        inputs = ProcessorInputs([], items, hf_processor_mm_kwargs=settings)
        return str(processor._get_mm_hashes(inputs)["image"][0])

    known = [hashed(one) for one in SETTINGS]
    assert len(set(known)) == len(SETTINGS)
    assert [hashed(one) for one in SETTINGS] == known
    monkeypatch.setattr(asked_module, "__version__", f"{__version__}.next")
    asked_module._built.cache_clear()
    later = [hashed(one) for one in SETTINGS]
    asked_module._built.cache_clear()
    assert later[0] == known[0], "a whole picture is vLLM's own"
    assert not set(later[1:]) & set(known)


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", pytest.param("llava_next", marks=pytest.mark.slow)]
)
def test_requests_that_were_thrown_out_are_answered_as_if_alone(
    family: str, engines: Callable[..., Any]
) -> None:
    """Cache for a few answers, more of them at once: blocks are taken, and filled again."""
    engine = engines(
        family, num_gpu_blocks_override=34, max_model_len=1024, max_num_batched_tokens=64,
        disable_log_stats=False, enable_prefix_caching=False,
    )  # fmt: skip
    pictures = [picture(280, 140, n) for n in range(3)]
    settings: list[dict[str, Any]] = [
        {"visprune": "divprune", "visprune_keep_ratio": 0.5}, {},
        {"visprune": "pool", "visprune_num_keep": 12},
        {"visprune": "uniform", "visprune_num_keep": 9},
    ]  # fmt: skip
    requests = [request(family, [one], own) for one in pictures for own in settings[:2]]
    requests += [request(family, pictures[:2], own) for own in settings[2:]]
    how = sampling()
    how.max_tokens = how.min_tokens = 100
    alone = [engine.generate([one], how, use_tqdm=False)[0] for one in requests]
    assert preempted(engine) == 0
    together = engine.generate(requests, how, use_tqdm=False)
    assert preempted(engine) > 0
    for one, other in zip(alone, together, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def preempted(engine: Any) -> int:
    """Times that a request lost its blocks."""
    return sum(x.value for x in engine.get_metrics() if x.name == "vllm:num_preemptions")
