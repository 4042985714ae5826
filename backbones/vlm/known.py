# SPDX-License-Identifier: Apache-2.0
"""What users know the families by, and what each can be shown."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version

CLIPS = "pictures, clips"
PICTURES = "pictures"
TILES = "pictures (tiles are one)"
TILES_AND_CLIPS = "pictures (tiles are one), clips"

# By `model_type`: the models, and what a budget is given for. Proved by tests on tiny models.
KNOWN: dict[str, tuple[str, str]] = {
    "llava": ("LLaVA-1.5, Pixtral", PICTURES),
    "llava_next": ("LLaVA-NeXT (1.6)", TILES),
    "qwen2_vl": ("Qwen2-VL", CLIPS),
    "qwen2_5_vl": ("Qwen2.5-VL", CLIPS),
    "qwen3_vl": ("Qwen3-VL", CLIPS),
    "qwen3_vl_moe": ("Qwen3-VL, mixture of experts", CLIPS),
    "internvl": ("InternVL 2.5, 3 and 3.5", TILES),
    "mistral3": ("Mistral Small 3.1, Ministral 3", PICTURES),
    "smolvlm": ("SmolVLM", TILES),
    "idefics3": ("Idefics 3", TILES),
    "idefics2": ("Idefics 2", TILES),
    "qwen2_5_omni_thinker": ("Qwen2.5-Omni (`model.thinker`)", CLIPS),
    "qwen3_omni_moe_thinker": ("Qwen3-Omni (`model.thinker`)", CLIPS),
    "cosmos3_omni": ("Cosmos 3", CLIPS),
    "cosmos3_edge": ("Cosmos 3 Edge", CLIPS),
    "glm4v": ("GLM-4.1V", CLIPS),
    "glm46v": ("GLM-4.6V", CLIPS),
    "glmga": ("GLM GA", CLIPS),
    "glm4v_moe": ("GLM-4.5V", CLIPS),
    "glm_ocr": ("GLM-OCR", CLIPS),
    "kimi_k25": ("Kimi K2.5", CLIPS),
    "video_llama_3": ("VideoLLaMA 3", CLIPS),
    "hyperclovax_vision_v2": ("HyperCLOVA X Vision", CLIPS),
    "paddleocr_vl": ("PaddleOCR-VL", PICTURES),
    "ovis2": ("Ovis 2", TILES),
    "fast_vlm": ("FastVLM", PICTURES),
    "deepseek_vl": ("DeepSeek-VL", PICTURES),
    "deepseek_vl_hybrid": ("DeepSeek-VL, two encoders", PICTURES),
    "janus": ("Janus", PICTURES),
    "aria": ("Aria", PICTURES),
    "vipllava": ("ViP-LLaVA", PICTURES),
    "lighton_ocr": ("LightOnOCR", PICTURES),
    "got_ocr2": ("GOT-OCR 2", TILES),
    "pp_chart2table": ("PP-Chart2Table", TILES),
    "qianfan_ocr": ("Qianfan-OCR", TILES),
    "apertus1p5": ("Apertus 1.5", PICTURES),
    "emu3": ("Emu3-Chat", PICTURES),
    "chameleon": ("Chameleon", PICTURES),
    "phi4_multimodal": ("Phi-4 multimodal", TILES),
    "llava_onevision": ("LLaVA-OneVision", TILES_AND_CLIPS),
    "llava_next_video": ("LLaVA-NeXT-Video", TILES_AND_CLIPS),
    "granite4_vision": ("Granite 4 Vision", TILES),
    "video_llava": ("Video-LLaVA", CLIPS),
    "ernie4_5_vl_moe": ("ERNIE 4.5 VL", CLIPS),
    "hunyuan_vl": ("HunYuan-VL, HunyuanOCR", PICTURES),
    "deepseek_ocr2": ("DeepSeek-OCR 2", TILES),
    "granite_docling": ("Granite Docling", TILES),
    "perception_lm": ("Perception LM", TILES_AND_CLIPS),
    "paligemma": ("PaliGemma, PaliGemma 2", PICTURES),
    "molmo2": ("Molmo 2", TILES),
    "gemma3": ("Gemma 3 (sliding windows)", PICTURES),
    "exaone4_5": ("EXAONE 4.5 (sliding windows)", PICTURES),
    "aya_vision": ("Aya Vision (sliding windows)", TILES),
    "cohere2_vision": ("Command A Vision (sliding windows)", TILES),
    "gemma4": ("Gemma 4, E2B and E4B too (sliding windows)", CLIPS),
    "gemma4_unified": ("Gemma 4 without an encoder (sliding windows)", PICTURES),
    "gemma3n": ("Gemma 3n (sliding windows)", PICTURES),
    "cohere_compass": ("Command A Compass (sliding windows)", CLIPS),
    "muse_glimmer": ("Muse Glimmer (sliding windows)", CLIPS),
    "muse_spark": ("Muse Spark (sliding windows)", CLIPS),
    "step3p7": ("Step 3.7 (sliding windows)", TILES),
    "nemotron_h_omni": ("Nemotron-H Omni (recurrent layers)", CLIPS),
    "qwen3_5": ("Qwen3.5 (recurrent layers)", CLIPS),
    "qwen3_5_moe": ("Qwen3.5, mixture of experts (recurrent layers)", CLIPS),
    "lfm2_vl": ("LFM2-VL (recurrent layers)", TILES),
    "lfm3_vl": ("LFM3-VL (recurrent layers, sliding windows)", CLIPS),
    "minicpmv4_6": ("MiniCPM-V 4.6 (recurrent layers)", CLIPS),
    "minicpm_ocr": ("MiniCPM-OCR (recurrent layers)", CLIPS),
    "minicpmv4_7": ("MiniCPM-V 4.7 (recurrent layers)", CLIPS),
}

# The first transformers that has a family, or in which it sees (Emu3) and has an inner model that
# merges pictures (the thinkers), of those that the lowest one allowed has not.
SINCE: dict[str, str] = {
    "minicpmv4_6": "5.7",
    **dict.fromkeys(("granite4_vision", "exaone4_5"), "5.8"),
    **dict.fromkeys(("glmga", "deepseek_ocr2", "gemma4_unified"), "5.10"),
    "cosmos3_omni": "5.11",
    **dict.fromkeys(("kimi_k25", "hunyuan_vl"), "5.13"),
    **dict.fromkeys(("cosmos3_edge", "muse_glimmer"), "5.15"),
    **dict.fromkeys(("cohere_compass", "step3p7", "emu3"), "5.16"),
    **dict.fromkeys(("hyperclovax_vision_v2", "nemotron_h_omni", "minicpmv4_7"), "5.18"),
    **dict.fromkeys(("molmo2", "muse_spark"), "5.20"),
    **dict.fromkeys(("minicpm_ocr", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), "5.21"),
    **dict.fromkeys(("granite_docling", "lfm3_vl"), "5.23"),
    "apertus1p5": "5.24",
}

# Families of the generic adapter whose operations are those that an independent counter sees.
COUNTED: tuple[str, ...] = (
    *("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cosmos3_edge", "internvl", "qianfan_ocr"),
    *("smolvlm", "idefics3", "glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr", "paddleocr_vl"),
    *("deepseek_vl", "janus", "vipllava", "llava_onevision", "llava_next_video", "video_llava"),
    *("mistral3", "lighton_ocr", "kimi_k25", "hyperclovax_vision_v2", "gemma3", "exaone4_5"),
    *("aya_vision", "cohere2_vision", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    *("video_llama_3", "paligemma", "ovis2", "hunyuan_vl", "qwen3_5", "qwen3_5_moe"),
    *("cohere_compass", "muse_glimmer", "muse_spark", "lfm2_vl", "lfm3_vl", "perception_lm"),
    *("gemma4", "step3p7", "got_ocr2", "pp_chart2table"),
)

_CODES = "its encoder is a convolutional network that makes codes of pixels"
_JOINS = "its encoder joins blocks of patches between two of its layers, or not, as a call says"
# The others, and why what they cost is not told.
UNCOUNTED: dict[str, str] = {
    "idefics2": "learned queries look at its pictures in layers of their own (a Perceiver)",
    "aria": "learned queries look at its pictures in its projector",
    "granite4_vision": "learned queries look at windows of its pictures, for several layers",
    "molmo2": "its projector attends within windows of two layers of its encoder",
    "fast_vlm": "its encoder is a convolutional network",
    "gemma3n": "its layers multiply tokens by matrices that they make of tokens (AltUp)",
    "deepseek_vl_hybrid": "it has two encoders, of grids of two sizes",
    "deepseek_ocr2": "it has two encoders, of which one is a decoder with learned queries",
    "gemma4_unified": "it has no encoder",
    "ernie4_5_vl_moe": "tokens of pictures and of text go to experts of different sizes",
    "granite_docling": "its connector has two paths, and a call says which one a page takes",
    "phi4_multimodal": "its projector works on the marks between rows and crops too",
    "nemotron_h_omni": "patches of pictures and of clips are embedded by matrices of two sizes",
    **dict.fromkeys(("emu3", "apertus1p5", "chameleon"), _CODES),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _JOINS),
}


# Whose image encoder can be read, with a class token or without: shown by tests that change one
# patch and look which token changes.
CLASS_TOKEN: tuple[str, ...] = (
    *("llava", "llava_next", "internvl", "qianfan_ocr", "vipllava", "llava_next_video"),
    *("video_llava", "perception_lm"),
)
READ: tuple[str, ...] = (
    *CLASS_TOKEN,
    *("deepseek_vl", "janus", "gemma3", "idefics3", "smolvlm", "aya_vision", "cohere2_vision"),
    *("llava_onevision", "paligemma", "ovis2", "granite_docling"),
)
# Whose positions are (t, h, w).
THREE_AXES: tuple[str, ...] = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cosmos3_edge"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "glm4v", "glm46v", "glm4v_moe", "glm_ocr"),
    *("paddleocr_vl", "ernie4_5_vl_moe", "hunyuan_vl", "qwen3_5", "qwen3_5_moe"),
    *("minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "glmga", "cohere_compass"),
)
# Whose visual tokens are joined from blocks of patches: methods that merge inside the encoder give
# the grid back before that, and patches that others drop would be missing.
JOINED: tuple[str, ...] = (
    *("internvl", "qianfan_ocr", "idefics3", "smolvlm", "gemma3", "aya_vision", "cohere2_vision"),
)
# What tokens can leave inside of.
REDUCED: tuple[str, ...] = (
    *("llava", "llava_next", "llava_onevision", "llava_next_video", "deepseek_vl", "janus"),
    *("paligemma", *JOINED),
)
# Whose encoder takes each patch with its place, so that patches can be left out before it.
BEFORE: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
# The first families, whose cost is counted too.
FIRST: tuple[str, ...] = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
# Every method is tested on them, and on one of each kind of decoder besides.
EVERY_METHOD: tuple[str, ...] = (
    *FIRST, "qwen3_vl", "internvl", "gemma3", "qwen3_5", "smolvlm",
)  # fmt: skip


def behind(since: str) -> str:
    """What to do where transformers here is older than ``since``; empty where it is not."""
    here = installed()
    if _numbers(here) >= _numbers(since):
        return ""
    return (
        f"it needs transformers {since} or later, and {here} is installed (pip install -U "
        f"'transformers>={since}')"
    )


@cache
def installed() -> str:
    """The version of transformers here; its metadata is a file, and prompts ask."""
    return version("transformers")


def lacking(family: str) -> str:
    """The same of the first version that has a family, or in which it can be pruned."""
    return behind(SINCE[family]) if family in SINCE else ""


def _numbers(told: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", told)[:2])


def signals(family: str) -> tuple[str, ...]:
    """What a family can show of its image encoder."""
    own = ("class token",) if family in CLASS_TOKEN else ()
    return (*own, "attention", "features") if family in READ else ()


def proof(family: str) -> str:
    """How it was proved that a dropped token is a hidden one."""
    return "every method" if family in EVERY_METHOD else "methods of each kind"


def table() -> str:
    """The families as a table in Markdown."""
    rows = [
        f"| `{kind}` | {models} | {shown} | {', '.join(signals(kind)) or 'no'} | "
        f"{'yes' if kind in (*FIRST, *COUNTED) else 'no'} | {proof(kind)} |"
        for kind, (models, shown) in KNOWN.items()
    ]
    head = "| `model_type` | models | takes | shows of its encoder | cost | proved with |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


if __name__ == "__main__":  # for the README, after a new row
    print(table())
