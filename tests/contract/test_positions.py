# SPDX-License-Identifier: Apache-2.0
"""The absolute (t, h, w) of Qwen-VL's pictures and clips, derived by hand, dense and pruned.

Versions of transformers have been wrong here: up to 5.5.3 a still picture of Qwen2.5-VL had its t
times the tokens of a second, up to 5.5.4 all frames of a clip had one t, and before 5.18 parts of a
second between frames were cut off.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests import tiny

Triples = list[tuple[int, int, int]]
QWEN = ("qwen2_vl", "qwen2_5_vl")
SPATIAL = [(h, w) for h in range(2) for w in range(2)]  # of a clip's frame, 4 x 4 patches merged


@torch.no_grad()
def positions(model: Any, inputs: dict[str, Any], generate: bool) -> Tensor:
    """(t, h, w) that the decoder was given, ``[B, S, 3]``."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        if generate:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        else:
            model(**inputs)
    finally:
        handle.remove()
    return seen[0][-3:].permute(1, 2, 0)  # generate puts the text's own row before the three


def text(first: int, count: int) -> Triples:
    return [(p, p, p) for p in range(first, first + count)]


def model_of(family: str) -> Any:
    model = tiny.build(family)
    model.config.vision_config.tokens_per_second = 2
    return model


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("family", QWEN)
def test_a_still_picture(family: str, generate: bool) -> None:
    """Three words and a start token at 0 to 3, 3 x 4 merged patches from 4, then 4 + max(3, 4)."""
    model, inputs = model_of(family), tiny.inputs(family, [[3, "a", 2], [9, "A", 9]])
    picture = [(4, 4 + h, 4 + w) for h in range(3) for w in range(4)]
    want = [*text(0, 4), *picture, *text(8, 3)]
    larger = [(10, 10 + h, 10 + w) for h in range(4) for w in range(6)]
    got = positions(model, inputs, generate)
    assert got[0, -len(want) :].tolist() == [list(p) for p in want]
    assert got[1, 10:34].tolist() == [list(p) for p in larger]
    assert got[1, 34:].tolist() == [list(p) for p in text(16, 10)]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize(
    ("family", "seconds", "interval"),
    [("qwen2_vl", None, 1), ("qwen2_5_vl", 0.5, 1), ("qwen2_5_vl", 1.0, 2), ("qwen2_5_vl", 2.0, 4)],
)
def test_a_clip(family: str, seconds: float | None, interval: int, generate: bool) -> None:
    """Two temporal patches of 2 x 2 from position 4; two tokens for each second in Qwen2.5-VL."""
    model, inputs = model_of(family), tiny.inputs(family, [[3, "v", 2]])
    if seconds is not None:
        inputs["second_per_grid_ts"] = torch.tensor([seconds])
    clip = [(4 + interval * t, 4 + h, 4 + w) for t in range(2) for h, w in SPATIAL]
    got = positions(model, inputs, generate)[0].tolist()
    assert got[:4] == [list(p) for p in text(0, 4)]
    assert got[4:12] == [list(p) for p in clip]
    if interval == 1:  # the clip is no longer than its frames are wide
        assert got[12:] == [list(p) for p in text(6, 3)]


@pytest.mark.parametrize("family", QWEN)
def test_survivors_keep_theirs(family: str) -> None:
    model, inputs = model_of(family), tiny.inputs(family, [[3, "v", 2, "a", 4]])
    dense = positions(model, inputs, generate=False)
    with visprune.prune(model, "uniform", num_keep=3) as run:
        seen: list[Tensor] = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append(kwargs["position_embeddings"][0]),
            with_kwargs=True,
        )
        model(**inputs)
        handle.remove()
        # Three words and a start, the clip from 4, an end, two words and a start, the picture.
        kept = torch.cat([run.trace.kept[0] + 16, run.trace.kept[1] + 4]).tolist()
    visual = (inputs["input_ids"][0] >= tiny.IMAGE) & (inputs["input_ids"][0] <= tiny.VIDEO)
    stay = [i for i in range(dense.shape[1]) if not visual[i] or i in kept]
    ids = dense[:, stay].permute(2, 0, 1)
    want = model.model.language_model.rotary_emb(torch.zeros(1, len(stay), 32), position_ids=ids)
    assert torch.equal(seen[0], want[0])
