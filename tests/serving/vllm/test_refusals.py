# SPDX-License-Identifier: Apache-2.0
"""What cannot be done is an error of the request, in a sentence; the engine lives on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import visprune
from tests.serving.vllm.asking import TOKENS, Clip, Transformers, picture, request, sampling
from visprune.backbones.vlm import embedded

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing left": ({"visprune": "todre", "visprune_num_keep": 0}, "at least 1, got 0"),
    "more than there is": (
        {"visprune": "todre", "visprune_num_keep": 577}, "exceeds the 576 visual tokens"),
    "a word": ({"visprune": "todre", "visprune_num_keep": "8"}, "whole number of tokens, got '8'"),
    "a share above one": ({"visprune": "todre", "visprune_keep_ratio": 1.5}, r"in \(0, 1\]"),
    "two budgets": (
        {"visprune": "todre", "visprune_num_keep": 8, "visprune_keep_ratio": 0.5}, "got both"),
    "no budget": ({"visprune": "todre"}, "got neither"),
    "a typing error": ({"visprune": "todr", "visprune_num_keep": 8}, "Did you mean 'todre'"),
    "a setting's": ({"visprune_keep": 8}, "Did you mean 'visprune_num_keep'"),
    "no method": ({"visprune_num_keep": 8}, "came without a method"),
    "a parameter": (
        {"visprune": "todre", "visprune_num_keep": 8, "visprune_params": {"objectiv": "x"}},
        "Did you mean 'objective'"),
    "the decoder": ({"visprune": "fastv", "visprune_num_keep": 8}, "acts inside the decoder"),
    "a stage there": (
        {"visprune": "todre", "visprune_num_keep": 8, "visprune_params": {"stage2": True}},
        "acts inside the decoder"),
    "the encoder": ({"visprune": "tome", "visprune_params": {"r": 2}}, "inside the image encoder"),
    "the text": ({"visprune": "cdpruner", "visprune_num_keep": 8}, "without a text"),
    "gaps in a line": (
        {"visprune": "todre", "visprune_num_keep": 8, "visprune_params": {"positions": "original"}},
        "leaves gaps"),
}  # fmt: skip


def test_each_is_a_sentence_and_the_engine_answers_after_it(engines: Callable[..., Any]) -> None:
    engine, own = engines("llava"), [picture(200, 200)]
    for settings, words in BAD.values():
        with pytest.raises(ValueError, match=words):
            engine.generate([request("llava", own, settings)], sampling(), use_tqdm=False)
    good = {"visprune": "todre", "visprune_num_keep": 8}
    output = engine.generate([request("llava", own, good)], sampling(), use_tqdm=False)
    assert len(output[0].prompt_token_ids) == 585 - 576 + 8


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen3_vl", "Timestamps stand"),
        pytest.param("internvl", "Words stand", marks=pytest.mark.slow),
    ],
)
def test_clips_with_words_between_frames_are_not_pruned_in_silence(
    family: str, words: str, engines: Callable[..., Any]
) -> None:
    """Nor are they by a budget that pictures beside them would take."""
    own = [Clip(np.zeros((4, 56, 56, 3), dtype="uint8"))]
    engine, wanted = engines(family), {"visprune": "todre", "visprune_num_keep": 2}
    with pytest.raises(ValueError, match=f"holds a video; of {family}, image tokens.*{words}"):
        engine.generate([request(family, own, wanted)], sampling(), use_tqdm=False)
    (whole,) = engine.generate([request(family, own, {})], sampling(), use_tqdm=False)
    assert len(whole.outputs[0].token_ids) == TOKENS


def test_requests_beside_the_servers_own_pruning_of_clips(
    engines: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, own = engines("qwen3_vl"), [picture(140, 140)]
    asked = request("qwen3_vl", own, {"visprune": "divprune", "visprune_num_keep": 4})
    info = engine.llm_engine.renderer.get_mm_processor().info
    config = info.ctx.model_config.get_multimodal_config()
    with monkeypatch.context() as patch:
        patch.setattr(config, "video_pruning_rate", 0.5)
        with pytest.raises(ValueError, match="both prune"):
            engine.generate([asked], sampling(), use_tqdm=False)
    (found,) = engine.generate([asked], sampling(), use_tqdm=False)
    assert len(found.outputs[0].token_ids) == TOKENS


def test_a_saved_method_is_the_default_and_requests_stand_above_it(
    engines: Callable[..., Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    oracle = Transformers("llava", folders("llava"))
    with visprune.prune(oracle.model, "divprune", num_keep=20) as run:
        visprune.save_pretrained(run, tmp_path / "saved", processor=oracle.processor)
    engine, own = engines("llava", model=tmp_path / "saved"), [picture(200, 200)]
    lengths = {}
    for name, settings in {
        "default": {}, "other budget": {"visprune_num_keep": 30}, "whole": {"visprune": None},
        "other method": {"visprune": "uniform", "visprune_keep_ratio": 0.5},
    }.items():  # fmt: skip
        output = engine.generate([request("llava", own, settings)], sampling(), use_tqdm=False)
        lengths[name] = len(output[0].prompt_token_ids) - (585 - 576)
    assert lengths == {"default": 20, "other budget": 30, "whole": 576, "other method": 288}


def test_a_default_that_cannot_be_served_does_not_start(
    engines: Callable[..., Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Named by hand, or by the folder; or beside vLLM's own pruning of clips."""
    own = {"visprune": "divprune", "visprune_keep_ratio": 0.5}
    with pytest.raises(ValueError, match="Did you mean 'divprune'"):
        engines("llava", mm_processor_kwargs={**own, "visprune": "divprun"})
    with pytest.raises(ValueError, match="both prune; start the server without the latter"):
        engines("qwen2_5_vl", video_pruning_rate=0.5, mm_processor_kwargs=own)
    model, processor = embedded.load()
    with visprune.prune(model, "fastv", num_keep=20) as run:
        visprune.save_pretrained(run, tmp_path / "saved", processor=processor)
    with pytest.raises(ValueError, match="fastv cannot prune llava in a server: it acts inside"):
        engines("llava", model=tmp_path / "saved")
