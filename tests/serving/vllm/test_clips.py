# SPDX-License-Identifier: Apache-2.0
"""Clips alone and among pictures, as transformers answers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.vllm.asking import Clip, Transformers, picture, request, sampling
from tests.serving.vllm.test_equal import compared


def clip(frames: int, width: int, height: int, fps: float = 2.0) -> Clip:
    """Squares of a seed, some of which change from frame to frame."""
    rng = np.random.default_rng([frames, width, height])
    small = rng.random((frames, height // 28, width // 28, 3))
    small[1:, : height // 56] = small[:1, : height // 56]
    pixels = (small.repeat(28, axis=1).repeat(28, axis=2) * 255).astype("uint8")
    return Clip(pixels, fps)


# Wider than long: behind a clip that goes on further in time than in space, transformers lets the
# text begin among its frames, and vLLM behind them.
CASES: dict[str, list[Any]] = {
    "slow": [clip(4, 140, 84, fps=3.0)],  # places between frames depend on the speed
    "fast": [clip(6, 112, 84, fps=8.0)],
    "among pictures": [picture(140, 84), clip(4, 84, 56, fps=4.0), picture(84, 140, 1)],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"visprune": "todre", "visprune_num_keep": 4},
    {"visprune": "divprune", "visprune_keep_ratio": 0.3},
    {"visprune": "pool", "visprune_num_keep": 4},
    {"visprune": "uniform", "visprune_keep_ratio": 0.5},
    {"visprune": "evs", "visprune_keep_ratio": 0.6},
    {"visprune": "vidcom2", "visprune_keep_ratio": 0.4},
    {"visprune": "keep_all"},
]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_vl", {"max_num_batched_tokens": 40}),  # chunks end within clips
        ("qwen2_5_vl", {}),
        ("llava_onevision", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_clips_and_pictures_in_one_batch(
    family: str, options: dict[str, Any], engines: Callable[..., Any],
    folders: Callable[[str], Path],
) -> None:  # fmt: skip
    engine, oracle = engines(family, **options), Transformers(family, folders(family))
    # vLLM cuts pictures of LLaVA-OneVision into crops beside others too, transformers does not.
    onevision = family == "llava_onevision"
    media = [[clip(12, 84, 56)], CASES["fast"]] if onevision else list(CASES.values())
    cases = [(own, one) for own in media for one in SETTINGS]
    # Frames that are interpolated once they are encoded are a little further apart.
    limit = 2e-5 if onevision else 1e-5
    first, _ = compared(engine, oracle, cases, limit)
    counts = {len(output.prompt_token_ids) for output in first}
    assert len(counts) > len(media), "methods leave different numbers"
    again, _ = compared(engine, oracle, cases, limit)
    assert sum(o.num_cached_tokens for o in again) > sum(o.num_cached_tokens for o in first)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_long_clips_stand_as_in_vllm(family: str, engines: Callable[..., Any]) -> None:
    """All tokens kept by a method, at the places that their features carry: as without one."""
    engine, media = engines(family), [picture(84, 56), clip(10, 56, 84, fps=1.0), picture(56, 56)]
    whole, kept = engine.generate(
        [request(family, media, one) for one in ({}, {"visprune": "keep_all"})], sampling(),
        use_tqdm=False,
    )  # fmt: skip
    assert whole.outputs[0].token_ids == kept.outputs[0].token_ids
    for one, other in zip(whole.outputs[0].logprobs, kept.outputs[0].logprobs, strict=True):
        for token, entry in one.items():
            assert abs(entry.logprob - other[token].logprob) < 1e-5


def test_what_a_clip_itself_would_tell_is_refused(engines: Callable[..., Any]) -> None:
    """Official shares of frames are known once they are seen; of a picture they are ahead."""
    engine, own = engines("qwen2_5_vl"), {"visprune": "vidcom2", "visprune_keep_ratio": 0.5,
                                          "visprune_params": {"exact": False}}  # fmt: skip
    with pytest.raises(ValueError, match="vidcom2 sees in a clip how many tokens stay"):
        engine.generate([request("qwen2_5_vl", [clip(4, 56, 84)], own)], sampling())
    still = engine.generate(
        [request("qwen2_5_vl", [picture(112, 112)], one) for one in ({}, own)], sampling()
    )
    assert len(still[0].prompt_token_ids) - len(still[1].prompt_token_ids) == 8
