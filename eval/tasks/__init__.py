# SPDX-License-Identifier: Apache-2.0
"""Tasks: what a model is asked, one module or package per benchmark. A task is a row here."""

from __future__ import annotations

# What a study of methods asks a vision-language model unless it says otherwise. Half of it is
# reading, grounding and following lines: what pruning breaks first.
STANDARD = (
    *("gqa", "pope", "mme", "scienceqa_img", "mmbench_en"),
    *("textvqa", "ocrbench", "docvqa", "chartqa", "refcoco_rec", "topology"),
)

TABLE = {
    "vqav2": "visprune.eval.tasks.vqa:VQAv2",
    "gqa": "visprune.eval.tasks.gqa:GQA",
    "textvqa": "visprune.eval.tasks.textvqa:TextVQA",
    "vizwiz": "visprune.eval.tasks.vqa:VizWiz",
    "pope": "visprune.eval.tasks.yes_no:POPE",
    "mme": "visprune.eval.tasks.yes_no:MME",
    "scienceqa_img": "visprune.eval.tasks.choice:ScienceQA",
    "mmbench_en": "visprune.eval.tasks.mmbench:MMBench",
    "seedbench_image": "visprune.eval.tasks.choice:SEEDBench",
    "ocrbench": "visprune.eval.tasks.ocrbench:OCRBench",
    "docvqa": "visprune.eval.tasks.documents:DocVQA",
    "infovqa": "visprune.eval.tasks.documents:InfoVQA",
    "chartqa": "visprune.eval.tasks.chartqa:ChartQA",
    "refcoco_rec": "visprune.eval.tasks.refcoco:RefCOCO",
    "imagenet": "visprune.eval.tasks.imagenet:ImageNet",
    "topology": "visprune.eval.tasks.topology:Topology",
    "embedded": "visprune.eval.tasks.embedded.task:EmbeddedTask",
    "folder": "visprune.eval.tasks.folder:Folder",
}
