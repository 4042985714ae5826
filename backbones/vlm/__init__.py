# SPDX-License-Identifier: Apache-2.0
"""Adapters of vision-language models, one file per family."""

from __future__ import annotations

TABLE = {
    "llava": "visprune.backbones.vlm.llava:LlavaAdapter",
    "llava_next": "visprune.backbones.vlm.llava_next:LlavaNextAdapter",
    "qwen2_vl": "visprune.backbones.vlm.qwen2_vl:Qwen2VLAdapter",
    "qwen2_5_vl": "visprune.backbones.vlm.qwen2_vl:Qwen2VLAdapter",
}
