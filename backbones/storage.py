# SPDX-License-Identifier: Apache-2.0
"""Models in folders: written and read by their own library, in its layout on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from visprune.backbones.encoders import AROUND, BIASED, PLAIN, WHOLE
from visprune.backbones.vlm.known import lacking
from visprune.errors import ConfigError, UnsupportedModel, first_line

__all__ = ["read_model", "write_model"]


def write_model(
    model: nn.Module, folder: Path, *, model_args: dict[str, Any] | None = None
) -> None:
    """Write weights as safetensors and the library's ``config.json``.

    Args:
        model: A model of transformers (PEFT's adapters too) or timm.
        folder: An existing folder.
        model_args: What a timm model was created with beside its name. Newer timm remembers it.

    Raises:
        UnsupportedModel: The model is of another library.
    """
    if hasattr(model, "pretrained_cfg") and hasattr(model, "num_classes"):
        from timm.models import save_for_hf

        given = {"model_args": model_args} if model_args else {}
        save_for_hf(model, str(folder), safe_serialization=True, **given)
    elif hasattr(model, "save_pretrained"):
        save: Any = model.save_pretrained
        save(folder)
    else:
        raise UnsupportedModel(
            f"{type(model).__name__} can be neither saved by transformers nor by timm. Save its "
            f"weights by its own library and the method by run.method.to_dict()."
        )


def read_model(folder: Path, **options: Any) -> nn.Module:
    """Load what :func:`write_model` wrote, or any model of the two libraries.

    Args:
        folder: Folder with a ``config.json``, or an ``adapter_config.json`` of PEFT.
        **options: Passed on: ``dtype`` and the like to transformers' ``from_pretrained``, model
            arguments to timm's ``create_model``.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    adapter, config = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        return _with_adapter(folder, adapter, options)
    if not config.is_file():
        raise ConfigError(f"{str(folder)!r} holds no model: there is no config.json in it.")
    fields = json.loads(config.read_text(encoding="utf-8"))
    try:
        if "architecture" in fields:
            return _timm_model(folder, options)
        return _transformers_model(folder, options)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        why = lacking(str(fields.get("model_type"))) or first_line(error)
        raise ConfigError(f"Cannot load the model in {str(folder)!r}: {why}.") from error


def _timm_model(folder: Path, options: dict[str, Any]) -> nn.Module:
    import timm

    import visprune.backbones.vit  # noqa: F401 - registers our models

    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def _transformers_model(folder: Path, options: dict[str, Any]) -> nn.Module:
    import transformers

    options.setdefault("dtype", "auto")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = (fields.get("architectures") or [""])[0]
    # An image encoder, or a model around one, is of its own class; else a vision-language model.
    own = (
        getattr(transformers, named, None) if named in {*PLAIN, *BIASED, *WHOLE, *AROUND} else None
    )
    kind: Any = transformers.AutoModelForImageTextToText if own is None else own
    return kind.from_pretrained(folder, local_files_only=True, **options).eval()


def _with_adapter(folder: Path, adapter: Path, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(f"{str(folder)!r} holds an adapter; it needs `pip install peft`.") from (
            error
        )
    name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    options.setdefault("dtype", torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(name, **options)
    return PeftModel.from_pretrained(base, str(folder)).eval()
