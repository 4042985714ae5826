# SPDX-License-Identifier: Apache-2.0
"""Adapters of image encoders that are plain vision transformers, one file per family.

Apart from ``backbones.vit``, whose import registers architectures in timm: this table is read
whenever a model is looked up, and imports nothing.
"""

from __future__ import annotations

# Keyed by library and class: the first row that names a class of the model's line of descent.
TABLE = {
    "timm.VisionTransformer": "visprune.backbones.encoders.timm_vit:TimmViT",
    "timm.Eva": "visprune.backbones.encoders.timm_eva:TimmEva",
    "open_clip.VisionTransformer": "visprune.backbones.encoders.open_clip_vit:OpenClipViT",
    "transformers.CLIPVisionModel": "visprune.backbones.encoders.hf_clip:HfClip",
    "transformers.CLIPVisionModelWithProjection": "visprune.backbones.encoders.hf_clip:HfClip",
    "transformers.SiglipVisionModel": "visprune.backbones.encoders.hf_clip:HfClip",
}

# Looked at, and left out for a reason.
REFUSED = {
    "timm.NaFlexVit": (
        "it packs pictures of many sizes into one padded batch, with a mask over the tokens of "
        "each; a reduction would have to cut that mask too"
    ),
    "timm.Beit": "its attention adds a bias per pair of grid places, which a merged token has not",
    "timm.SwinTransformer": "its windows need the whole grid of tokens at every layer",
    "timm.SwinTransformerV2": "its windows need the whole grid of tokens at every layer",
}
