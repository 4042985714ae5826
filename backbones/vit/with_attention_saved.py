# SPDX-License-Identifier: Apache-2.0
"""A ViT of timm with replaced attention: the calls that made it, and making it again."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import load_pretrained
from torch import nn

from visprune.backbones.vit.agent import GridAgentAttention
from visprune.backbones.vit.grid_attention import GridNeighborhoodAttention, with_attention
from visprune.backbones.vit.with_attention_contmix import GridContMix
from visprune.backbones.vit.with_attention_hilo import GridHiLo
from visprune.errors import ConfigError, first_line


def calls_of(model: nn.Module) -> list[dict[str, Any]]:
    """Arguments of the calls of :func:`with_attention` that a model went through.

    They are read off its modules and can be written as JSON; empty for any other model.
    """
    calls: list[dict[str, Any]] = []
    blocks = getattr(model, "blocks", None)
    for index, block in enumerate(blocks.children() if isinstance(blocks, nn.Module) else ()):
        kinds = (GridNeighborhoodAttention, GridHiLo, GridAgentAttention, GridContMix)
        found = next((part for part in block.modules() if isinstance(part, kinds)), None)
        if found is None:
            continue
        arguments = found.arguments()
        same = next((c for c in calls if c == {**arguments, "blocks": c["blocks"]}), None)
        if same is None:
            calls.append({**arguments, "blocks": [index]})
        else:
            same["blocks"].append(index)
    return calls


def rebuilt(folder: Path, calls: Any, options: dict[str, Any]) -> nn.Module:
    """The model of a folder: timm's, its attention replaced, and then its weights.

    Args:
        folder: With timm's ``config.json`` and ``model.safetensors``.
        calls: What :func:`calls_of` gave for the model that was saved.
        options: For ``timm.create_model``.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: The model cannot be built, or the weights do not fit it.
    """
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False, **options)
        for call in calls:
            with_attention(model, copy_weights=False, **call)
        of_timm = import_module(type(model).__module__)
        load_pretrained(
            model,
            num_classes=model.num_classes,
            in_chans=options.get("in_chans") or model.pretrained_cfg["input_size"][0],
            filter_fn=getattr(of_timm, "checkpoint_filter_fn", None),
        )
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"Cannot load the model in {str(folder)!r}: {first_line(error)}."
        ) from error
    plain: nn.Module = model.eval()
    return plain
