# SPDX-License-Identifier: Apache-2.0
"""What cannot be done is an error of the request, in a sentence; the engine lives on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.multimodal.processing import ProcessorInputs
from vllm.multimodal.processing.context import TimingContext

import visprune
from tests.serving.vllm.asking import TOKENS, Clip, Transformers, picture, request, sampling
from tests.serving.vllm.checkpoints import build
from tests.serving.vllm.test_equal import compared
from visprune.backbones.vlm import embedded
from visprune.serving.vllm.internvl import InternVL
from visprune.serving.vllm.llava import Llava, LlavaNext
from visprune.serving.vllm.onevision import OneVision
from visprune.serving.vllm.qwen import Qwen2VL, Qwen3VL, Qwen25VL

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
    "the cache": (
        {"visprune": "snapkv", "visprune_num_keep": 8}, "a server's cache is the server's own"),
    "two methods": (
        {"visprune": "divprune+random", "visprune_num_keep": 8}, "a server prunes by one"),
    "the encoder": ({"visprune": "tome", "visprune_params": {"r": 2}}, "inside the image encoder"),
    "the text": ({"visprune": "cdpruner", "visprune_num_keep": 8}, "without a text"),
    "gaps in a line": (
        {"visprune": "todre", "visprune_num_keep": 8, "visprune_params": {"positions": "original"}},
        "leaves gaps"),
}  # fmt: skip


def test_each_is_a_sentence_and_the_engine_answers_after_it(engines: Callable[..., Any]) -> None:
    engine, own = engines("llava"), [picture(200, 200)]
    for settings, words in BAD.values():
        with pytest.raises(ValueError, match=words) as said:
            engine.generate([request("llava", own, settings)], sampling(), use_tqdm=False)
        if "cannot prune" in str(said.value):
            assert "Methods that can: todre, divprune, " in str(said.value)
    good = {"visprune": "todre", "visprune_num_keep": 8}
    output = engine.generate([request("llava", own, good)], sampling(), use_tqdm=False)
    assert len(output[0].prompt_token_ids) == 585 - 576 + 8


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen3_vl", "Timestamps stand"),
        ("internvl", "Words stand"),
    ],
)
def test_clips_with_words_between_frames_are_not_pruned_in_silence(
    family: str, words: str, engines: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    """Nor are they by a budget that pictures beside them would take; whole they are answered.

    (vLLM 0.32 answers clips of Qwen3-VL otherwise than transformers, with the plug-in or without.)
    """
    frames = np.stack([np.asarray(picture(56, 56, n)) for n in range(4)])
    own = [Clip(frames)]
    engine, wanted = engines(family), {"visprune": "todre", "visprune_num_keep": 2}
    with pytest.raises(ValueError, match=f"holds a video; of {family}, image tokens.*{words}"):
        engine.generate([request(family, own, wanted)], sampling(), use_tqdm=False)
    if family == "internvl":
        compared(engine, Transformers(family, folders(family)), [(own, {})])
    else:
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


def processor(folder: Path, **more: Any) -> Any:
    """What prepares the prompts of a server, which this does not start."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return MULTIMODAL_REGISTRY.create_processor(
        ModelConfig(model=str(folder), dtype="float32", **more)
    )


def test_pictures_that_come_as_features_are_not_pruned(folders: Callable[[str], Path]) -> None:
    """Of which it is not known which is where; without settings they are vLLM's own matter."""
    made = processor(folders("llava"), enable_mm_embeds=True)
    items = made.info.parse_mm_data({"image": torch.zeros(1, 576, 128)})
    own = {"visprune": "divprune", "visprune_num_keep": 8}
    with pytest.raises(ValueError, match=r"an image that comes as embeddings.*Send the image"):
        made.apply(ProcessorInputs([4], items, hf_processor_mm_kwargs=own), TimingContext())
    found = made.apply(ProcessorInputs([4], items), TimingContext())
    assert len(found["prompt_token_ids"]) == 576


def test_pixtral_is_served_as_it_is(tmp_path: Path) -> None:
    """By the same class of vLLM's as LLaVA; settings are refused, at the start and of a request."""
    folder = build("pixtral", tmp_path / "model")
    own = {"visprune": "divprune", "visprune_keep_ratio": 0.5}
    with pytest.raises(ValueError, match="its pictures have tokens between their rows"):
        processor(folder, mm_processor_kwargs=own)
    made = processor(folder)
    items = made.info.parse_mm_data({"image": [picture(56, 84)]})
    with pytest.raises(ValueError, match="its pictures have tokens between their rows"):
        made.apply(ProcessorInputs([10], items, hf_processor_mm_kwargs=own), TimingContext())
    found = made.apply(ProcessorInputs([10], items), TimingContext())
    assert len(found["prompt_token_ids"]) == 6 * (4 + 1)


def test_what_a_worker_cannot_do_ends_its_start() -> None:
    """Encoders in CUDA graphs, of any family; Qwen-VL in more than one pipeline stage."""
    graphs = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=True),
    )
    for kind in (Llava, LlavaNext, OneVision, InternVL, Qwen2VL, Qwen25VL, Qwen3VL):
        with pytest.raises(ValueError, match="encoded in CUDA graphs: set cudagraph_mm_encoder"):
            kind(vllm_config=graphs)
    stages = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    for kind in (Qwen2VL, Qwen25VL, Qwen3VL):
        with pytest.raises(ValueError, match=r"the first of 2 pipeline stages alone\. Use tensor"):
            kind(vllm_config=stages)


def test_a_layout_that_is_not_known_is_refused(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a later vLLM, say: places would be given to other tokens."""
    made = processor(folders("llava"))
    monkeypatch.setattr(made, "places", lambda *args: (torch.zeros(575, 3), 0))
    own = {"visprune": "divprune", "visprune_num_keep": 8}
    items = made.info.parse_mm_data({"image": [picture(56, 84)]})
    with pytest.raises(ValueError, match=r"visprune counts 575 tokens of image 0, vLLM 576"):
        made.apply(ProcessorInputs([4], items, hf_processor_mm_kwargs=own), TimingContext())


def test_a_checkpoint_without_the_layer_that_methods_read_ends_the_start(
    engines: Callable[..., Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """CLIP's last, which the model itself does not need."""
    folder = shutil.copytree(folders("llava_next"), tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    fewer = {name: x for name, x in stored.items() if "encoder.layers.2." not in name}
    assert 0 < len(fewer) < len(stored)
    save_file(fewer, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \[.*k_proj.*of the image encoder's last layer"):
        engines("llava_next", model=folder)
