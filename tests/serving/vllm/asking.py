# SPDX-License-Identifier: Apache-2.0
"""The same prompts to a server and to transformers with visprune, and how far they are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import visprune
from tests.serving.vllm.checkpoints import END, IMAGE, START, VIDEO
from visprune.catalog import methods

TOKENS = 5


@dataclass(frozen=True)
class Clip:
    """A clip: frames, uint8 ``[t, H, W, 3]``, so many a second, all of which are shown."""

    frames: np.ndarray[Any, Any]
    fps: float = 2.0

    @property
    def known(self) -> dict[str, Any]:
        """What is known of it beside its frames."""
        count = len(self.frames)
        return {"fps": self.fps, "total_num_frames": count, "duration": count / self.fps,
                "frames_indices": list(range(count))}  # fmt: skip


Media = Sequence[Image.Image | Clip]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Squares of 28 pixels in colours of a seed."""
    rng = np.random.default_rng([seed, width, height])
    small = rng.random((max(1, height // 28), max(1, width // 28), 3))
    image = Image.fromarray((small * 255).astype("uint8"))
    return image.resize((width, height), Image.Resampling.NEAREST)


def prompt(family: str, media: Media) -> str:
    """Words around as many pictures and clips."""
    if family == "llava":
        marks = "\n".join(["<image>"] * len(media))
        return f"USER: {marks}\nhow many circles are there ? ASSISTANT:"
    if family == "internvl":  # whose processor writes start and end itself
        marks = ["<video>" if isinstance(one, Clip) else "<IMG_CONTEXT>" for one in media]
        return "w1 w2 " + " w5 ".join(marks) + " w3 w4 w7 w8"
    llava = family.startswith("llava")
    marks = [
        ("<video>" if isinstance(one, Clip) else "<image>")
        if llava
        else f"{START} {VIDEO if isinstance(one, Clip) else IMAGE} {END}"
        for one in media
    ]
    return "w1 w2 " + " w5 ".join(marks) + " w3 w4 w7 w8"


def _sorted(media: Media) -> tuple[list[Image.Image], list[Clip]]:
    return (
        [x for x in media if not isinstance(x, Clip)],
        [x for x in media if isinstance(x, Clip)],
    )


def request(family: str, media: Media, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``LLM.generate`` takes."""
    pictures, clips = _sorted(media)
    data: dict[str, Any] = {"image": pictures} if pictures else {}
    if clips:
        data["video"] = [(x.frames, {**x.known, "do_sample_frames": False}) for x in clips]
    found: dict[str, Any] = {"prompt": prompt(family, media)}
    if data:
        found["multi_modal_data"] = data
    return {**found, "mm_processor_kwargs": settings} if settings else found


def sampling(**more: Any) -> Any:
    """Greedy, a fixed number of tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, logprobs=5, detokenize=False, **more
    )


class Transformers:
    """The oracle: the same folder in transformers, under ``visprune.prune``."""

    def __init__(self, family: str, folder: Any, dtype: torch.dtype = torch.float32) -> None:
        self.family = family
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self._known: dict[str, tuple[Any, tuple[int, torch.Tensor, list[int]]]] = {}

    def answer(self, media: Media, settings: dict[str, Any]) -> tuple[int, torch.Tensor, list[int]]:
        """Length of the prompt as pruned, log-probabilities of its next token, greedy tokens."""
        name = repr(([id(one) for one in media], settings))  # asked again where a server is
        if name not in self._known:
            self._known[name] = media, self._answer(media, settings)  # the media keep their ids
        return self._known[name][1]

    @torch.no_grad()
    def _answer(
        self, media: Media, settings: dict[str, Any]
    ) -> tuple[int, torch.Tensor, list[int]]:
        pictures, clips = _sorted(media)
        given: dict[str, Any] = {"images": pictures} if pictures else {}
        if clips:
            given |= {"videos": [x.frames for x in clips], "do_sample_frames": False,
                      "video_metadata": [x.known for x in clips]}  # fmt: skip
        inputs = dict(self.processor(text=prompt(self.family, media), return_tensors="pt", **given))
        length = inputs["input_ids"].shape[1]
        with self._pruned(settings) as run:
            logits = self.model(**inputs).logits[0, -1]
            if run is not None:
                trace = run.trace
                length -= sum(n - len(k) for n, k in zip(trace.num_tokens, trace.kept, strict=True))
            out = self.model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
        return length, logits.float().log_softmax(-1), tokens

    def _pruned(self, settings: dict[str, Any]) -> Any:
        if not settings:
            return contextlib.nullcontext()
        served = methods.get(settings["visprune"]).served
        params = {**served, **settings.get("visprune_params", {})}
        if not self.family.startswith("qwen"):
            params["positions"] = "compact"  # as a server counts positions of a line
        for name in ("num_keep", "keep_ratio"):
            if f"visprune_{name}" in settings:
                params[name] = settings[f"visprune_{name}"]
        return visprune.prune(self.model, settings["visprune"], **params)


def distance(output: Any, logprobs: torch.Tensor) -> float:
    """Largest difference of the log-probabilities that a server reports of the next token."""
    shown = output.outputs[0].logprobs[0]
    return max(abs(entry.logprob - logprobs[token].item()) for token, entry in shown.items())
