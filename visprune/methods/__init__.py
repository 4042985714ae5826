# SPDX-License-Identifier: Apache-2.0
"""The methods, one file per paper; controls beside them. A method is a file and a row here."""

from __future__ import annotations

TABLE = {
    "todre": "visprune.methods.todre:ToDRE",
    "divprune": "visprune.methods.divprune:DivPrune",
    "fastv": "visprune.methods.fastv:FastV",
    "pyramiddrop": "visprune.methods.pyramiddrop:PyramidDrop",
    "visionzip": "visprune.methods.visionzip:VisionZip",
    "keep_all": "visprune.methods.keep_all:KeepAll",
    "random": "visprune.methods.random_keep:RandomKeep",
    "uniform": "visprune.methods.uniform:Uniform",
    "pool": "visprune.methods.pool:Pool",
    "tome": "visprune.methods.tome:ToMe",
    "pitome": "visprune.methods.pitome:PiToMe",
    "evit": "visprune.methods.evit:EViT",
    "topk": "visprune.methods.topk:TopK",
    "dynamicvit": "visprune.methods.dynamicvit:DynamicViT",
    "cdpruner": "visprune.methods.cdpruner:CDPruner",
    "fastervlm": "visprune.methods.fastervlm:FasterVLM",
    "vispruner": "visprune.methods.vispruner:VisPruner",
    "prumerge": "visprune.methods.prumerge:PruMerge",
    "prumerge_plus": "visprune.methods.prumerge:PruMergePlus",
    "trim": "visprune.methods.trim:TRIM",
    "holov": "visprune.methods.holov:HoloV",
    "hiprune": "visprune.methods.hiprune:HiPrune",
    "gprune": "visprune.methods.gprune:GPrune",
    "scope": "visprune.methods.scope:SCOPE",
    "prunesid": "visprune.methods.prunesid:PruneSID",
    "idpruner": "visprune.methods.idpruner:IDPruner",
    "vscan": "visprune.methods.vscan:VScan",
    "random_deep": "visprune.methods.random_deep:RandomDeep",
    "v2drop": "visprune.methods.v2drop:V2Drop",
    "dart": "visprune.methods.dart:DART",
    "vtw": "visprune.methods.vtw:VTW",
}
