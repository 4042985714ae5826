# SPDX-License-Identifier: Apache-2.0
"""Load a model where that is asked for, make a prompt for it, and run the contract."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from visprune.errors import ConfigError, UnsupportedModel, first_line
from visprune.eval.models.base import ModelEntry, Request, offline
from visprune.eval.models.load_vlm import load
from visprune.eval.models.vlm import VLM
from visprune.eval.show.vlm import open_picture
from visprune.eval.tasks.base import Sample
from visprune.machine.check.report import Report
from visprune.machine.check.whole import check_model
from visprune.machine.find import unwrap

__all__ = ["check", "drawn"]

QUESTION = "What is in this picture?"


def check(
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    picture: str | Path | Image.Image | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attention: str | None = None,
) -> Report:
    """Run the contract of pruning on a model: its version, kernel, dtype and device.

    Keep-all against the untouched model, dropping against hiding, a batch against its prompts
    alone, ``generate`` with its cache against one forward, and removal. About fifteen forwards of
    one prompt; the model is left as it was.

    Args:
        model: a vision-language model of transformers, ``(model, processor)``, or a name as
            ``visprune check`` takes it: ``embedded``, a folder, or a name on the Hub.
        inputs: a prompt with a picture, as the model's processor returns it. ``None``: one is made
            with the processor, which is looked for where the model came from.
        picture: the picture of that prompt, in place of a drawn one.
        dtype: of a model that is loaded here.
        device: the same.
        attention: the same.

    Returns:
        A report: print it, or read ``safe``, ``first_failure`` and ``rows``.

    Raises:
        ConfigError: there is no such model, picture or processor, or the model is pruned already.
        UnsupportedModel: no adapter can be tried on the model.

    Example:
        >>> print(visprune.check(model, inputs))  # doctest: +SKIP
        >>> assert visprune.check("embedded").safe
    """
    if inputs is not None:
        if isinstance(model, str | Path):
            model = load(ModelEntry(str(model), dtype, device, attention)).model
        return check_model(model[0] if isinstance(model, tuple) else model, inputs)
    if isinstance(model, str | Path):
        vlm = load(ModelEntry(str(model), dtype, device, attention))
    elif isinstance(model, tuple):
        vlm = VLM(*model)
    else:
        vlm = VLM(model, _processor(model))
    if vlm.adapter is None:
        raise UnsupportedModel(vlm.no_adapter)
    shown = drawn() if picture is None else picture
    image = shown if isinstance(shown, Image.Image) else open_picture(shown)
    request = Request(Sample("0", QUESTION, lambda: image), QUESTION, image)
    return check_model(vlm.model, vlm.inputs([request], "chat"))


def drawn() -> Image.Image:
    """A picture with something in every corner, for a prompt that needs one."""
    image = Image.new("RGB", (448, 336))
    ramp = torch.linspace(0, 255, 448).round().to(torch.uint8)
    image.paste(Image.fromarray(ramp.expand(336, -1).contiguous().numpy()).convert("RGB"))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 150, 150), fill="red")
    draw.rectangle((300, 40, 420, 140), fill="blue")
    draw.polygon(((60, 300), (120, 190), (180, 300)), fill="green")
    draw.line((260, 310, 430, 190), fill="yellow", width=12)
    return image


def _processor(model: Any) -> Any:
    """The processor that a model came with.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoProcessor

    config = getattr(unwrap(model), "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    ask = "Give inputs (what a processor returns for a prompt with a picture), or a processor too."
    if not name:
        raise ConfigError(f"Nothing says which processor {type(model).__name__} has. {ask}")
    try:
        return AutoProcessor.from_pretrained(
            name, local_files_only=Path(name).is_dir() or offline()
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ConfigError(
            f"The processor of {name!r} cannot be loaded: {first_line(error)}. {ask}"
        ) from error
