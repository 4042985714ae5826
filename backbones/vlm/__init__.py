# SPDX-License-Identifier: Apache-2.0
"""Adapters of vision-language models, one file per family."""

from __future__ import annotations

_RETRIEVAL = (
    "it retrieves pages by the vector of every visual token and generates no text; without some of "
    "them it is another index"
)

TABLE = {
    "llava": "visprune.backbones.vlm.llava:LlavaAdapter",
    "llava_next": "visprune.backbones.vlm.llava_next:LlavaNextAdapter",
    "qwen2_vl": "visprune.backbones.vlm.qwen2_vl:Qwen2VLAdapter",
    "qwen2_5_vl": "visprune.backbones.vlm.qwen2_vl:Qwen2VLAdapter",
}

# Looked at, by `model_type`, and left out for a reason.
REFUSED = {
    "fuyu": (
        "it has no image encoder: patches of pixels (image_patches) go straight into the decoder, "
        "between newline tokens that it counts rows by"
    ),
    "chameleon": "it reads a picture as discrete codes of its vocabulary, which it also writes",
    "emu3": "it reads a picture as discrete codes of its vocabulary, which it also writes",
    "colpali": _RETRIEVAL,
    "colqwen2": _RETRIEVAL,
    "colmodernvbert": _RETRIEVAL,
}
