# SPDX-License-Identifier: Apache-2.0
"""Adapters of image encoders that are plain vision transformers, one file per family.

Apart from ``backbones.vit``, whose import registers architectures in timm: these tables are read
whenever a model is looked up, and import nothing.
"""

from __future__ import annotations

# transformers' encoders that one adapter takes, by class.
PLAIN = (
    "AltCLIPVisionModel", "Aimv2VisionModel", "Blip2VisionModel", "BlipVisionModel",
    "CLIPSegVisionModel", "CLIPVisionModel", "CLIPVisionModelWithProjection",
    "ChineseCLIPVisionModel", "DINOv3ViTBackbone", "DINOv3ViTModel", "DeiTModel", "Dinov2Backbone",
    "Dinov2Model", "Dinov2WithRegistersBackbone", "Dinov2WithRegistersModel", "GitVisionModel",
    "IJepaModel", "Idefics2VisionTransformer", "Idefics3VisionTransformer",
    "InstructBlipVideoVisionModel", "InstructBlipVisionModel", "InternVLVisionModel",
    "Kosmos2VisionModel", "MLCDVisionModel", "MetaClip2VisionModel",
    "MetaClip2VisionModelWithProjection", "OwlViTVisionModel", "OwlViTVisionTransformer",
    "Owlv2VisionModel", "Owlv2VisionTransformer", "QianfanOCRVisionModel", "Siglip2VisionModel",
    "SiglipVisionModel",
    "SmolVLMVisionTransformer", "ViTMAEModel", "ViTMSNModel", "ViTModel", "VideoMAEModel",
    "VivitModel",
)  # fmt: skip

# Those whose attention adds a bias per pair of places.
BIASED = ("BeitBackbone", "BeitModel", "Data2VecVisionModel")
# Those that give every patch a value back.
WHOLE = ("XCLIPVisionModel",)

# Keyed by library and class: the first row that names a class of the model's line of descent.
TABLE = {
    "timm.VisionTransformer": "visprune.backbones.encoders.timm_vit:TimmViT",
    "timm.Beit": "visprune.backbones.encoders.timm_beit:TimmBeit",
    "timm.Cait": "visprune.backbones.encoders.timm_cait:TimmCait",
    "timm.Eva": "visprune.backbones.encoders.timm_eva:TimmEva",
    "timm.VisionTransformerRelPos": "visprune.backbones.encoders.timm_relpos:TimmRelPos",
    "timm.NaFlexVit": "visprune.backbones.encoders.timm_naflex:TimmNaFlex",
    "timm.DeepseekVitEncoder": "visprune.backbones.encoders.timm_towers:TimmDeepseek",
    "timm.Gemma4VitEncoder": "visprune.backbones.encoders.timm_towers:TimmGemma4",
    "timm.Qwen3VitEncoder": "visprune.backbones.encoders.timm_towers:TimmQwen3",
    "open_clip.VisionTransformer": "visprune.backbones.encoders.open_clip_vit:OpenClipViT",
    **{f"transformers.{name}": "visprune.backbones.encoders.hf_vit:HfViT" for name in PLAIN},
    **{f"transformers.{name}": "visprune.backbones.encoders.hf_beit:HfBeit" for name in BIASED},
    **{f"transformers.{name}": "visprune.backbones.encoders.hf_xclip:HfXCLIP" for name in WHOLE},
}

# What the models of a class lack, as their adapter says why; others may have no class token.
_BIASED, _TOWER = ("merging", "every_query"), ("cls_token", "dropping")
LACKING = {
    "timm.Beit": _BIASED,
    "timm.VisionTransformerRelPos": _BIASED,
    **{f"transformers.{name}": _BIASED for name in BIASED},
    "timm.Cait": ("cls_token", "every_query"),
    "timm.DeepseekVitEncoder": _TOWER,
    "timm.Gemma4VitEncoder": _TOWER,
    "timm.Qwen3VitEncoder": _TOWER,
    **{f"transformers.{name}": (*_TOWER, "every_query") for name in WHOLE},
}

# Models of timm around one of these: where it is.
TIMM_AROUND = {
    "timm.DeepseekVitClassifier": "encoder",
    "timm.Gemma4VitClassifier": "encoder",
    "timm.Qwen3VitClassifier": "encoder",
}

# Models of transformers around one of these, which classify or compare pictures: where it is, and
# whether they take the plain mean of its patches.
AROUND = {
    "AltCLIPModel": ("vision_model", False),
    "Aimv2Model": ("vision_model", False),
    "BlipModel": ("vision_model", False),
    "CLIPModel": ("vision_model", False),
    "ChineseCLIPModel": ("vision_model", False),
    "MetaClip2Model": ("vision_model", False),
    "OwlViTModel": ("vision_model", False),
    "Owlv2Model": ("vision_model", False),
    "Siglip2Model": ("vision_model", False),
    "SiglipModel": ("vision_model", False),
    "BeitForImageClassification": ("beit", False),
    "Data2VecVisionForImageClassification": ("data2vec_vision", False),
    "XCLIPModel": ("vision_model", False),
    "CLIPForImageClassification": ("vision_model", True),
    "DeiTForImageClassification": ("deit", False),
    "DeiTForImageClassificationWithTeacher": ("deit", False),
    "Dinov2ForImageClassification": ("dinov2", True),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", True),
    "IJepaForImageClassification": ("ijepa", True),
    "MetaClip2ForImageClassification": ("vision_model", True),
    "Siglip2ForImageClassification": ("vision_model", True),
    "SiglipForImageClassification": ("vision_model", True),
    "ViTForImageClassification": ("vit", False),
    "ViTMSNForImageClassification": ("vit", False),
    "VideoMAEForVideoClassification": ("videomae", True),
    "VivitForVideoClassification": ("vivit", False),
}

# By what adapter the encoder in them is taken, where it is not a plain one.
AROUND_OTHER = {
    "BeitForImageClassification": "transformers.BeitModel",
    "Data2VecVisionForImageClassification": "transformers.Data2VecVisionModel",
    "XCLIPModel": "transformers.XCLIPVisionModel",
}

_WINDOWS = "its windows need the whole grid of tokens at every layer"
_STAGES = "its stages halve the grid, and need all of it"
_CONVOLVES = "it convolves over the grid of tokens, and needs all of it"
_MAPS = "it makes a map of its tokens, or boxes, one for each place of the grid"
_PACKED = "it packs pictures of many sizes into one sequence without a batch"
_FACTORS = "it attends within a frame and then along time, which needs a grid of both"

# Looked at, and left out for a reason.
REFUSED = {
    "timm.VisionTransformerSAM": _WINDOWS,
    "timm.Xcit": "its attention is between channels, and its layers convolve over the grid",
    "timm.ConVit": "half of its attention is a function of places in the grid",
    "timm.CrossVit": "its two branches of different patches exchange class tokens",
    "timm.VOLO": "its outlook attention folds windows of the grid",
    "timm.SwinTransformer": _WINDOWS,
    "timm.SwinTransformerV2": _WINDOWS,
    "transformers.SwinModel": _WINDOWS,
    "transformers.SwinBackbone": _WINDOWS,
    "transformers.SwinForImageClassification": _WINDOWS,
    "transformers.Swinv2Model": _WINDOWS,
    "transformers.Swinv2Backbone": _WINDOWS,
    "transformers.Swinv2ForImageClassification": _WINDOWS,
    "transformers.Swin2SRModel": _WINDOWS,
    "transformers.DonutSwinModel": _WINDOWS,
    "transformers.DonutSwinForImageClassification": _WINDOWS,
    "transformers.MaskFormerSwinBackbone": _WINDOWS,
    "transformers.VitDetModel": _WINDOWS,
    "transformers.VitDetBackbone": _WINDOWS,
    "transformers.LwDetrViTBackbone": _WINDOWS,
    "transformers.RfDetrDinov2Backbone": _WINDOWS,
    "transformers.SamVisionModel": _WINDOWS,
    "transformers.SamHQVisionModel": _WINDOWS,
    "transformers.Sam2VisionModel": _WINDOWS,
    "transformers.Sam3VisionModel": _WINDOWS,
    "transformers.EdgeTamVisionModel": _STAGES,
    "transformers.DinatModel": _WINDOWS,
    "transformers.DinatBackbone": _WINDOWS,
    "transformers.DinatForImageClassification": _WINDOWS,
    "transformers.HieraModel": _STAGES,
    "transformers.HieraBackbone": _STAGES,
    "transformers.HieraForImageClassification": _STAGES,
    "transformers.CvtForImageClassification": _STAGES,
    "transformers.LevitModel": _STAGES,
    "transformers.LevitForImageClassification": _STAGES,
    "transformers.LevitForImageClassificationWithTeacher": _STAGES,
    "transformers.PvtModel": _STAGES,
    "transformers.PvtForImageClassification": _STAGES,
    "transformers.PvtV2Backbone": _STAGES,
    "transformers.PvtV2ForImageClassification": _STAGES,
    "transformers.SegformerModel": _STAGES,
    "transformers.SegformerForImageClassification": _STAGES,
    "transformers.GLPNModel": _STAGES,
    "transformers.MobileViTModel": _CONVOLVES,
    "transformers.MobileViTForImageClassification": _CONVOLVES,
    "transformers.MobileViTV2Model": _CONVOLVES,
    "transformers.MobileViTV2ForImageClassification": _CONVOLVES,
    "transformers.SwiftFormerModel": _CONVOLVES,
    "transformers.SwiftFormerForImageClassification": _CONVOLVES,
    "transformers.DPTModel": _MAPS,
    "transformers.VitPoseBackbone": _MAPS,
    "transformers.OwlViTForObjectDetection": _MAPS,
    "transformers.Owlv2ForObjectDetection": _MAPS,
    "transformers.CLIPSegModel": _MAPS,
    "transformers.YolosModel": (
        "its detection tokens lie behind the patches, and a box comes of each; only tokens before "
        "the patches are kept out of a reduction"
    ),
    "transformers.VideoPrismVisionModel": _FACTORS,
    "transformers.VideoPrismForVideoClassification": _FACTORS,
    "transformers.TimesformerModel": _FACTORS,
    "transformers.TimesformerForVideoClassification": _FACTORS,
    "transformers.VJEPA2Model": (
        "its attention turns every token by its number in the clip, which a shorter sequence has "
        "not"
    ),
    "transformers.VJEPA2ForVideoClassification": (
        "its attention turns every token by its number in the clip, which a shorter sequence has "
        "not"
    ),
    "transformers.PixtralVisionModel": _PACKED,
    "transformers.Qwen3VLVisionModel": _PACKED,
    "transformers.Glm4vVisionModel": _PACKED,
    "transformers.GroupViTVisionModel": "its layers group the patches into segments already",
    "transformers.MllamaVisionModel": (
        "its tokens are those of four tiles side by side, under a mask over the tiles"
    ),
    "transformers.Llama4VisionModel": (
        "its rotary table is one for all pictures of a batch, and their tokens would differ"
    ),
    "transformers.ImageGPTModel": "its pixels are words that are read in order; it has no patches",
    "transformers.ImageGPTForImageClassification": (
        "its pixels are words that are read in order; it has no patches"
    ),
    "transformers.FlavaImageModel": (
        "its layers return tuples, as no other plain encoder of transformers does any more"
    ),
    "transformers.ViTMAEForPreTraining": (
        "its decoder puts every visible patch back to its place; take model.vit"
    ),
    "transformers.VideoMAEForPreTraining": (
        "its decoder puts every visible patch back to its place; take model.videomae"
    ),
    "transformers.BeitForSemanticSegmentation": _MAPS,
    "transformers.Data2VecVisionForSemanticSegmentation": _MAPS,
    "transformers.BeitForMaskedImageModeling": (
        "it names the masked patches, each at its place; take model.beit"
    ),
    "transformers.ViTForMaskedImageModeling": (
        "it paints the masked patches, each at its place; take model.vit"
    ),
    "transformers.DeiTForMaskedImageModeling": (
        "it paints the masked patches, each at its place; take model.deit"
    ),
}
