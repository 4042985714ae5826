# SPDX-License-Identifier: Apache-2.0
"""Adapters of vision-language models, one file per family."""

from __future__ import annotations

_RETRIEVAL = (
    "it retrieves pages by the vector of every visual token and generates no text; without some of "
    "them it is another index"
)

_RECURRENT = (
    "layers of its decoder carry a state from token to token beside indexed keys, other streams or "
    "distances that count what is stored: a token that was dropped is not gone from those"
)
_INDEXER = "its attention looks up keys by an index of their own, which counts every token"
_CROSS = "its decoder looks at pictures by cross-attention: none of its tokens is visual"
_QUERIES = (
    "its generate passes its own forward by and gives another model embeddings, in which 32 "
    "queries stand for a picture already"
)
_INSIDE = (
    "its decoder puts pictures into the text by itself, and counts the places of its tokens by "
    "what is stored"
)
_ENCODED = (
    "its visual tokens stand in a text encoder, at which its decoder looks by cross-attention"
)

_GENERIC = "visprune.backbones.vlm.generic:GenericAdapter"

TABLE = {
    "llava": "visprune.backbones.vlm.llava:LlavaAdapter",
    "llava_next": "visprune.backbones.vlm.llava_next:LlavaNextAdapter",
    "qwen2_vl": "visprune.backbones.vlm.qwen2_vl:Qwen2VLAdapter",
    "qwen2_5_vl": "visprune.backbones.vlm.qwen2_vl:Qwen2VLAdapter",
    "qwen3_vl": _GENERIC,
    "qwen3_vl_moe": _GENERIC,
    "internvl": "visprune.backbones.vlm.generic:TilesAdapter",
    "mistral3": _GENERIC,
    "smolvlm": "visprune.backbones.vlm.generic:NamedTilesAdapter",
    "idefics3": "visprune.backbones.vlm.generic:NamedTilesAdapter",
    "idefics2": "visprune.backbones.vlm.generic:QueryRowsAdapter",
    "qwen2_5_omni_thinker": _GENERIC,
    "qwen3_omni_moe_thinker": _GENERIC,
    "cosmos3_omni": _GENERIC,
    "cosmos3_edge": _GENERIC,
    "glm4v": "visprune.backbones.vlm.generic:OneIdAdapter",
    "glm46v": "visprune.backbones.vlm.generic:OneIdAdapter",
    "glmga": "visprune.backbones.vlm.generic:OneIdAdapter",
    "glm4v_moe": "visprune.backbones.vlm.generic:OneIdAdapter",
    "glm_ocr": "visprune.backbones.vlm.generic:OneIdAdapter",
    "kimi_k25": "visprune.backbones.vlm.chunks:ChunksAdapter",
    "video_llama_3": _GENERIC,
    "hyperclovax_vision_v2": _GENERIC,
    "paddleocr_vl": _GENERIC,
    "ovis2": "visprune.backbones.vlm.generic:OvisAdapter",
    "fast_vlm": _GENERIC,
    "deepseek_vl": _GENERIC,
    "deepseek_vl_hybrid": _GENERIC,
    "janus": _GENERIC,
    "aria": "visprune.backbones.vlm.generic:QueriesAdapter",
    "vipllava": _GENERIC,
    "lighton_ocr": _GENERIC,
    "got_ocr2": "visprune.backbones.vlm.sam:SamTilesAdapter",
    "pp_chart2table": "visprune.backbones.vlm.sam:SamTilesAdapter",
    "qianfan_ocr": "visprune.backbones.vlm.generic:TilesAdapter",
    "apertus1p5": _GENERIC,
    "emu3": "visprune.backbones.vlm.marked:CodesAdapter",
    "chameleon": "visprune.backbones.vlm.inside:ChameleonAdapter",
    "phi4_multimodal": "visprune.backbones.vlm.inside:Phi4Adapter",
    "llava_onevision": "visprune.backbones.vlm.packed:OneVisionAdapter",
    "llava_next_video": "visprune.backbones.vlm.packed:NextVideoAdapter",
    "granite4_vision": "visprune.backbones.vlm.packed:GraniteAdapter",
    "video_llava": "visprune.backbones.vlm.packed:VideoLlavaAdapter",
    "ernie4_5_vl_moe": "visprune.backbones.vlm.marked:ErnieAdapter",
    "hunyuan_vl": "visprune.backbones.vlm.marked:HunYuanAdapter",
    "deepseek_ocr2": "visprune.backbones.vlm.marked:SeparatorAdapter",
    "granite_docling": "visprune.backbones.vlm.marked:RealTilesAdapter",
    "perception_lm": "visprune.backbones.vlm.perception:PerceptionAdapter",
    "paligemma": "visprune.backbones.vlm.both_ways:BothWaysAdapter",
    "molmo2": "visprune.backbones.vlm.both_ways:PooledAdapter",
    "gemma3": _GENERIC,
    "exaone4_5": _GENERIC,
    "aya_vision": "visprune.backbones.vlm.generic:MarkedTilesAdapter",
    "cohere2_vision": "visprune.backbones.vlm.generic:MarkedTilesAdapter",
    "gemma4": "visprune.backbones.vlm.gemma:Gemma4Adapter",
    "gemma4_unified": "visprune.backbones.vlm.gemma:Gemma4Adapter",
    "gemma3n": "visprune.backbones.vlm.gemma:Gemma3nAdapter",
    "cohere_compass": _GENERIC,
    "muse_glimmer": _GENERIC,
    "muse_spark": _GENERIC,
    "step3p7": "visprune.backbones.vlm.views:ViewsAdapter",
    "nemotron_h_omni": "visprune.backbones.vlm.nemotron:NemotronHAdapter",
    "qwen3_5": _GENERIC,
    "qwen3_5_moe": _GENERIC,
    "lfm2_vl": "visprune.backbones.vlm.slices:NaFlexTilesAdapter",
    "lfm3_vl": _GENERIC,
    "minicpmv4_6": "visprune.backbones.vlm.slices:SlicesAdapter",
    "minicpm_ocr": "visprune.backbones.vlm.slices:SlicesAdapter",
    "minicpmv4_7": "visprune.backbones.vlm.slices:SlicesAdapter",
}

# Looked at, by `model_type`, and left out for a reason.
REFUSED: dict[str, str] = {
    "fuyu": (
        "it has no image encoder: patches of pixels (image_patches) go straight into the decoder, "
        "between newline tokens that it counts rows by"
    ),
    "qwen2_5_omni": "it holds a whole model that sees: prune that, model.thinker",
    "qwen3_omni_moe": "it holds a whole model that sees: prune that, model.thinker",
    "llama4": "its forward raises in transformers 5.24, pruned or not",
    **dict.fromkeys(("mllama", "idefics"), _CROSS),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _QUERIES),
    **dict.fromkeys(("blip", "pix2struct", "pp_formulanet", "vision-encoder-decoder"), _CROSS),
    **dict.fromkeys(("florence2", "t5gemma2", "udop"), _ENCODED),
    **dict.fromkeys(("git", "kosmos-2", "kosmos-2.5"), _INSIDE),
    "pi0": "it writes the actions of a robot and no text",
    "diffusion_gemma": "it writes a block of tokens at once, over and over, and not one by one",
    "evolla": "it reads proteins and no pictures",
    **dict.fromkeys(
        (
            "qwen4_exp",
            "glm5_next",
            "inkling_mm_model",
            "inkling2",
            "inkling2_loop",
        ),
        _RECURRENT,
    ),
    "shieldgemma2": "it holds a Gemma 3 that sees, and judges by one word of it: prune model.model",
    "unlimited_ocr": (
        "its layers see the whole prompt from anywhere and a window of the answer, which are told "
        "apart by what is stored"
    ),
    **dict.fromkeys(("hy_v4_vl", "mistral_large4", "dots3_note", "minimax_m3_vl"), _INDEXER),
    "colpali": _RETRIEVAL,
    "colqwen2": _RETRIEVAL,
    "colmodernvbert": _RETRIEVAL,
}
