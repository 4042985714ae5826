# SPDX-License-Identifier: Apache-2.0
"""Score a saved model on the embedded questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from visprune.backbones.vlm.embedded import PROMPT
from visprune.eval.tasks.embedded import KINDS, load


@torch.inference_mode()
def score_saved(folder: str | Path, questions: int = 2100, split: str = "test") -> dict[str, float]:
    """Accuracy of a model folder the way users run it: one question per prompt, ``generate``, fp32.

    Args:
        folder: What ``from_pretrained`` reads.
        questions: How many questions.
        split: Which split.

    Returns:
        Share of exact answers per kind, and over all questions under ``"all"``.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    right, total = Counter[str](), Counter[str]()
    for picture in load(split, questions):
        prompts = [PROMPT.format(question=q.text) for q in picture.questions]
        images = [picture.image] * len(prompts)
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(output, skip_special_tokens=True)
        for question, answer in zip(picture.questions, answers, strict=True):
            for key in (question.kind, "all"):
                right[key] += answer.strip() == question.answer
                total[key] += 1
    return {key: right[key] / total[key] for key in (*KINDS, "all") if total[key]}
