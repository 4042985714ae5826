# SPDX-License-Identifier: Apache-2.0
"""Score a saved model on the embedded questions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from visprune.backbones.vlm.embedded import PROMPT
from visprune.eval.tasks.embedded import KINDS, load
from visprune.train.embedded.data import TOKENS, VOCABULARY, encode_questions, to_pixels
from visprune.train.embedded.parts import answer_logits


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


@torch.inference_mode()
def score_random(
    folder: str | Path, keep: int, questions: int = 2100, split: str = "test", seed: int = 0
) -> dict[str, float]:
    """Accuracy when each picture keeps ``keep`` random visual tokens, before the decoder.

    Kept tokens stay in order and at their positions. All questions of a picture share the tokens
    and one forward; each is still blind to the others, so answers are those of single prompts.

    Args:
        folder: What ``from_pretrained`` reads.
        keep: Visual tokens kept of 576; 576 keeps all, 0 none.
        questions: How many questions.
        split: Which split.
        seed: Seed of the selection.

    Returns:
        Share of right answers per kind, and over all questions under ``"all"``.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    right, total = Counter[str](), Counter[str]()
    for picture in load(split, questions):
        pixels = to_pixels([picture.pixels])
        visual = torch.stack(list(model.get_image_features(pixels).pooler_output))  # [1, 576, D]
        index = torch.randperm(TOKENS, generator=draw)[:keep].sort().values
        batch = encode_questions([picture])
        logits = answer_logits(model, visual[:, index], index[None], batch)
        said = logits.argmax(-1)[batch.kind >= 0].tolist()
        for question, token in zip(picture.questions, said, strict=True):
            for key in (question.kind, "all"):
                right[key] += VOCABULARY[token] == question.answer
                total[key] += 1
    return {key: right[key] / total[key] for key in (*KINDS, "all") if total[key]}
