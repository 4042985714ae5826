# SPDX-License-Identifier: Apache-2.0
"""What vLLM itself ships for clips, token by token, through what the plug-in calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.multimodal.video_prune import evs, vidcom2

from visprune.backbones.vlm.picture import grid
from visprune.core.method import ModelSpec
from visprune.serving.asked import read
from visprune.serving.shorten import Encoded, shorten

QWEN = ModelSpec("qwen2_5_vl", 28, has_cls=False, multi_axis_rope=True)


@pytest.mark.parametrize(("name", "shipped"), [("evs", evs), ("vidcom2", vidcom2)])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.75, 0.95])
def test_the_same_tokens_of_a_clip_stay(name: str, shipped: Any, rate: float) -> None:
    torch.manual_seed(int(100 * rate))
    for frames, rows, columns in ((1, 3, 4), (4, 3, 5), (9, 6, 2)):
        features = torch.randn(frames, rows * columns, 32)
        features[frames // 2 :] += 2 * torch.randn(
            32
        )  # frames unlike the others have a larger share
        rows_of_clip = features.flatten(0, 1)
        pos = grid(frames, rows, columns)
        one = read({"visprune": name, "visprune_keep_ratio": 1 - rate}, {}, QWEN, frozenset())
        assert one is not None
        told = shipped.compute_retained_tokens_count(
            tokens_per_frame=rows * columns, num_frames=frames, q=rate
        )
        assert one.count(pos, "video", QWEN) == told
        mask = shipped.compute_retention_mask(
            rows_of_clip, (frames, 2 * rows, 2 * columns), 2, rate
        )
        _, index = shorten(one, Encoded(rows_of_clip, pos, kind="video"), QWEN)
        assert index.tolist() == mask.nonzero()[:, 0].tolist()
