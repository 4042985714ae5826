# SPDX-License-Identifier: Apache-2.0
"""All families that the registry has: the first four, and those of :mod:`tests.families.tiny`."""

from __future__ import annotations

from typing import Any

from tests import tiny as first
from tests.families import tiny

CLAIMED = (*first.FAMILIES, *tiny.FAMILIES)
CLIPS = ("qwen2_vl", "qwen2_5_vl", *(name for name, spec in tiny.FAMILIES.items() if spec.clip))
# Families of the kind of another (``test_bad_input.kind``): what the machine does with a call, and
# not with their pictures, is tested on the other.
TWINS = (
    *("qwen2_5_vl", "paligemma2", "molmo2_scaled", "gemma4_unified", "qwen3_5_moe"),
    *("minicpm_ocr", "chameleon_swin", "llava_onevision_shrunk", "qianfan_ocr"),
    *("pp_chart2table", "lighton_ocr", "vipllava", "deepseek_vl", "deepseek_vl_hybrid"),
    *("janus", "fast_vlm", "apertus1p5", "hyperclovax_vision_v2", "smolvlm", "qwen3_vl_moe"),
    *("cosmos3_omni", "cosmos3_edge", "glm46v", "glmga", "glm4v_moe", "glm_ocr"),
    *("muse_glimmer", "muse_spark", "cohere2_vision"),
)
KINDS = tuple(family for family in CLAIMED if family not in TWINS)


def build(family: str, *, attn: str = "sdpa") -> Any:
    """A tiny model of any of them."""
    return first.build(family, attn=attn) if family in first.FAMILIES else tiny.build(
        family, attn=attn
    )  # fmt: skip


def inputs(family: str, rows: list[list[Any]], *, pad_side: str = "left") -> dict[str, Any]:
    """Inputs of rows of segments: an int is that many words, a letter a picture, "v" a clip."""
    if family == "llava":  # its pictures are of one size
        rows = [[part.lower() if isinstance(part, str) else part for part in row] for row in rows]
    made = first if family in first.FAMILIES else tiny
    return made.inputs(family, rows, pad_side=pad_side)


def recurrent(family: str) -> bool:
    """Whether layers carry a state: what is dropped cannot be hidden, it is absent."""
    return family in tiny.FAMILIES and tiny.FAMILIES[family].recurrent
