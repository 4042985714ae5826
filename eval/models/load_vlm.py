# SPDX-License-Identifier: Apache-2.0
"""Vision-language models by name: the embedded one, a folder, the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from visprune.backbones.vlm.known import lacking
from visprune.errors import ConfigError, first_line
from visprune.eval.environment import quiet_loading
from visprune.eval.models.base import ModelEntry, offline
from visprune.eval.models.names import EMBEDDED, check_transformers
from visprune.eval.models.vlm import PLAIN, VLM
from visprune.machine.saved import PROCESSOR_FILES, read_asked, read_learned

__all__ = ["load"]


def load(spec: ModelEntry, local_rank: int = 0) -> VLM:
    """Load the embedded model, a folder's, or the Hub's.

    Raises:
        ConfigError: there is no such model, it is not there offline, or it is of another kind.
    """
    device = spec.torch_device(local_rank)
    if spec.name == EMBEDDED:
        from visprune.backbones.vlm import embedded

        with quiet_loading():
            dtype = torch.float32 if spec.dtype == "auto" else getattr(torch, spec.dtype)
            model, processor = embedded.load(dtype)
        if spec.attention is not None:
            model.set_attn_implementation(spec.attention)
        return VLM(model.to(device), processor, name=EMBEDDED, template=spec.template or PLAIN,
                   style="plain", pad=spec.pad)  # fmt: skip
    model, processor = _from_transformers(spec)
    asked: Any = read_asked(spec.name) or {}  # a folder of this library says how it was taught
    template, style = spec.template or asked.get("template"), asked.get("style")
    return VLM(model.eval().to(device), processor, name=spec.name, template=template, style=style,
               pad=spec.pad, learned=read_learned(spec.name))  # fmt: skip


def _from_transformers(spec: ModelEntry) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    check_transformers(spec.name)
    here = Path(spec.name).is_dir()
    options: dict[str, Any] = {"dtype": spec.dtype, "local_files_only": here or offline()}
    if spec.attention is not None:
        options["attn_implementation"] = spec.attention
    if spec.revision is not None:
        options["revision"] = spec.revision
    common = {k: v for k, v in options.items() if k in ("local_files_only", "revision")}
    try:
        processor = AutoProcessor.from_pretrained(spec.name, **common, **spec.processor)
        model = AutoModelForImageTextToText.from_pretrained(spec.name, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        there = {path.name for path in Path(spec.name).iterdir()} if here else set()
        lack = _lacking(spec.name, common)
        if not lack and "config.json" in there and not there.intersection(PROCESSOR_FILES):
            raise ConfigError(
                f"{spec.name!r} holds no processor (tokenizer, picture sizes), so no question can "
                f"be put to the model in it. Save one beside it: visprune.save_pretrained(run, "
                f"folder, processor=processor), or processor.save_pretrained(folder)."
            ) from error
        away = " The Hub is not asked (HF_HUB_OFFLINE)." if offline() and not here else ""
        raise ConfigError(
            f"transformers cannot load a vision-language model and its processor from "
            f"{spec.name!r}: {lack or first_line(error)}.{away}"
        ) from error
    return model, processor


def _lacking(name: str, options: dict[str, Any]) -> str:
    """What to install where this transformers has not the family of a model; empty: it has."""
    from transformers import PretrainedConfig

    try:
        fields, _ = PretrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError):
        return ""
    return lacking(str(fields.get("model_type")))
