# SPDX-License-Identifier: Apache-2.0
"""A text-only row as long as the whole input: the batch is no shorter, yet tokens were dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests import tiny


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "params"), [("uniform", {}), ("fastv", {"layer": 2})])
def test_dropped_tokens_predict_nothing(
    name: str, params: dict[str, Any], side: str, models: Any
) -> None:
    model = models("llava")
    inputs = tiny.inputs("llava", [[3, "a", 6], [50]], pad_side=side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with visprune.prune(model, name, num_keep=8, **params) as run:
        out = model(**inputs, labels=labels)
    picture = inputs["input_ids"][0] == tiny.IMAGE
    gone = torch.zeros_like(picture)
    gone[picture.nonzero()[:, 0]] = True
    gone[picture.nonzero()[run.trace.kept[0], 0]] = False
    gone |= inputs["attention_mask"][0] == 0  # padding is not computed either
    logits = out.logits.detach()
    assert torch.equal(run.trace.index[0] < 0, gone)
    assert bool(logits.isfinite().all())
    lost = torch.cat([gone.new_zeros(1), gone[:-1]])
    wanted = labels.clone()
    wanted[0, lost] = -100
    rows, target = logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()
    manual = torch.nn.functional.cross_entropy(rows[target != -100], target[target != -100])
    torch.testing.assert_close(out.loss.detach(), manual)
    assert run.trace.ignored_labels == int((lost & (labels[0] != -100)).sum())
