# SPDX-License-Identifier: Apache-2.0
"""A reduced encoder compiles as one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.towers import oracle, small


@pytest.mark.parametrize(
    ("kind", "method", "params"),
    [
        ("plain", "tome", {"r": 3}),
        ("plain", "evit", {"keep_ratio": 0.6}),
        ("eva_rope", "topk", {"keep_ratio": 0.6}),
        ("average_no_class", "pitome", {"keep_ratio": 0.8}),
    ],
)
def test_one_graph(kind: str, method: str, params: dict[str, Any]) -> None:
    model = small.small(small.KINDS[kind], 2)
    x = small.picture(model)
    with visprune.prune(model, method, **params) as run, torch.no_grad():
        want, kept = model(x), run.kept
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        oracle.assert_close(compiled(x), want)
        assert torch.equal(run.kept, kept)
        other = small.picture(model, seed=9)
        oracle.assert_close(compiled(other), model(other))
    torch._dynamo.reset()
