# SPDX-License-Identifier: Apache-2.0
"""Score a saved model on the embedded questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from visprune.eval.evaluate import evaluate
from visprune.eval.tasks.embedded import KINDS

_BATCH = 16


def score_saved(folder: str | Path, questions: int = 2100, split: str = "test") -> dict[str, float]:
    """Accuracy of a model folder the way `visprune eval` runs it, fp32.

    Args:
        folder: What ``from_pretrained`` reads.
        questions: How many questions.
        split: Which split.

    Returns:
        Share of exact answers per kind, and over all questions under ``"all"``.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    asked = evaluate(
        model, processor, tasks={"task": "embedded", "split": split, "limit": questions},
        controls=["none"], batch_size=_BATCH, prompt_style="plain", progress=False,
    )  # fmt: skip
    right, total = Counter[str](), Counter[str]()
    for record in asked.records:
        for key in (record.kind, "all"):
            right[key] += record.text in record.answers
            total[key] += 1
    return {key: right[key] / total[key] for key in (*KINDS, "all") if total[key]}
