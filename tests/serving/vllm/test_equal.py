# SPDX-License-Identifier: Apache-2.0
"""What a server answers is what transformers answers under the same method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.vllm.asking import Transformers, distance, picture, request, sampling
from visprune.serving.asked import fitting
from visprune.serving.places import shown_layers, spec_of

SHAPES = {
    "wide": [picture(280, 140)],
    "tall": [picture(140, 280)],
    "tiny": [picture(56, 56)],
    "square": [picture(168, 168)],
    "several": [picture(140, 140), picture(140, 280, 1), picture(168, 168, 2)],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"visprune": "todre", "visprune_num_keep": 4},
    {"visprune": "divprune", "visprune_keep_ratio": 0.3},
    {"visprune": "pool", "visprune_num_keep": 4},
    {"visprune": "random", "visprune_num_keep": 9999, "visprune_params": {"strict": False}},
    {"visprune": "keep_all"},
]


def compared(
    engine: Any,
    oracle: Transformers,
    cases: list[tuple[list[Any], dict[str, Any]]],
    limit: float = 1e-5,
) -> tuple[list[Any], float]:
    """Ask all at once, and compare one by one; returns the outputs and the largest distance."""
    requests = [request(oracle.family, *case) for case in cases]
    outputs = engine.generate(requests, sampling(), use_tqdm=False)
    worst = 0.0
    for output, (pictures, settings) in zip(outputs, cases, strict=True):
        length, logprobs, tokens = oracle.answer(pictures, settings)
        assert len(output.prompt_token_ids) == length, settings
        worst = max(worst, distance(output, logprobs))
        assert worst < limit, (settings, worst)
        assert list(output.outputs[0].token_ids) == tokens, settings
    return outputs, worst


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("qwen2_vl", {}, marks=pytest.mark.slow),
        ("qwen2_5_vl", {"max_num_batched_tokens": 40}),  # chunks end within pictures
        ("qwen3_vl", {}),
        ("llava_next", {}),
        pytest.param("llava_onevision", {}, marks=pytest.mark.slow),
        pytest.param("internvl", {"max_num_batched_tokens": 40}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_shapes_and_settings_in_one_batch(
    family: str, options: dict[str, Any], engines: Callable[..., Any],
    folders: Callable[[str], Path],
) -> None:  # fmt: skip
    """Each shape of picture under each method; then again, from the caches."""
    engine, oracle = engines(family, **options), Transformers(family, folders(family))
    # vLLM cuts each of several pictures of LLaVA-OneVision into crops, transformers none of them.
    shapes = [x for x in SHAPES.values() if family != "llava_onevision" or len(x) == 1]
    cases = [(pictures, one) for pictures in shapes for one in SETTINGS]
    if family == "internvl":  # whose encoder is read
        fits = fits_of(oracle)
        assert {"todre", "visionzip"} <= set(fits)
        pruning = [name for name in fits if name not in ("keep_all", "todre")]
        cases += [(SHAPES["wide"], {"visprune": x, "visprune_num_keep": 20}) for x in pruning]
    elif family == "llava_onevision":  # draws are of a picture's own crops, without their padding
        drawn = {"visprune": "random", "visprune_num_keep": 8}
        cases += [(shapes[0], drawn), (shapes[-1], drawn)]
    # Its features are interpolated once they are encoded, and are a little further apart.
    limit = 2e-5 if family == "llava_onevision" else 1e-5
    first, _ = compared(engine, oracle, cases, limit)
    again, _ = compared(engine, oracle, cases, limit)
    assert sum(o.num_cached_tokens for o in again) > sum(o.num_cached_tokens for o in first)


def fits_of(oracle: Transformers) -> list[str]:
    """Methods that a server of the model prunes with."""
    config = oracle.model.config
    return [name for name, why in fitting(spec_of(config), shown_layers(config)).items() if not why]


def test_every_method_that_fits_on_the_embedded_model(
    engines: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    """Class-token pivots and merged tokens too; two budgets of one picture are two pictures."""
    engine, oracle = engines("llava"), Transformers("llava", folders("llava"))
    fits = fits_of(oracle)
    assert {"todre", "divprune", "visionzip", "random", "uniform", "pool", "scope"} <= set(fits)
    two = [picture(200, 200), picture(336, 112, 1)]
    cases: list[Any] = [(two[:1], {})]
    for name in fits:
        budget = {} if name == "keep_all" else {"visprune_num_keep": 40}
        cases.append((two[:1], {"visprune": name, **budget}))
    cases.append((two[:1], {"visprune": "todre", "visprune_num_keep": 32}))
    cases.append((two, {"visprune": "todre", "visprune_keep_ratio": 0.1}))
    compared(engine, oracle, cases)


@pytest.mark.slow
def test_half_precision_is_within_its_noise(
    engines: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    """Positions are exact in bfloat16: pruned answers are as near as whole ones."""
    engine = engines("qwen2_5_vl", dtype="bfloat16")
    oracle = Transformers("qwen2_5_vl", folders("qwen2_5_vl"), torch.bfloat16)
    wide = [picture(1120, 28 * 4)]  # far beyond what bfloat16 tells apart within a row
    settings = [{}, {"visprune": "uniform", "visprune_num_keep": 40}]
    outputs = engine.generate(
        [request("qwen2_5_vl", wide, one) for one in settings], sampling(), use_tqdm=False
    )
    for output, one in zip(outputs, settings, strict=True):
        length, logprobs, _ = oracle.answer(wide, one)
        assert len(output.prompt_token_ids) == length
        assert distance(output, logprobs) < 0.1
