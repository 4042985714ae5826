# SPDX-License-Identifier: Apache-2.0
"""Image classifiers by name: a folder, timm's names, open_clip's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visprune.errors import ConfigError, did_you_mean, first_line
from visprune.eval.models.base import EvalModel, ModelEntry, offline
from visprune.eval.models.vit import TimmClassifier, ZeroShot
from visprune.eval.tasks.imagenet import zero_shot_classifier
from visprune.machine.saved import load_pretrained, read_learned

__all__ = ["load"]

_FOLDER = "local-dir:"  # timm's word for a folder in place of a name


def load(spec: ModelEntry, library: str, name: str, local_rank: int = 0) -> EvalModel:
    """Load a timm or open_clip model by name.

    Raises:
        ConfigError: the library does not know it, or its weights cannot be had.
    """
    if spec.pad:
        raise ConfigError(
            f"pad is of vision-language models; {spec.name} is an image classifier, and its "
            f"transform says how pictures are prepared."
        )
    device = spec.torch_device(local_rank)
    dtype = torch.float32 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return (_timm if library == "timm" else _open_clip)(spec, name, device, dtype)


def _timm(spec: ModelEntry, name: str, device: torch.device, dtype: torch.dtype) -> EvalModel:
    import timm

    import visprune.backbones.vit  # noqa: F401 - registers our architectures in timm

    if name.startswith(_FOLDER) and spec.checkpoint is None:
        folder = name.removeprefix(_FOLDER)
        model, run = load_pretrained(folder)
        if run is not None:  # the study says what to run; it may be that
            run.remove()
        return TimmClassifier(model.to(device, dtype), name=spec.name, learned=read_learned(folder))
    try:
        model = timm.create_model(
            name, pretrained=spec.checkpoint is None, checkpoint_path=spec.checkpoint or ""
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise _cannot(spec, "timm", name, timm.list_models(), error) from error
    learned = read_learned(name.removeprefix(_FOLDER)) if ":" in name else None
    return TimmClassifier(model.to(device, dtype), name=spec.name, learned=learned)


def _open_clip(spec: ModelEntry, name: str, device: torch.device, dtype: torch.dtype) -> EvalModel:
    import open_clip

    architecture, _, tag = name.partition("/")
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=spec.checkpoint or tag or None, device=device
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise _cannot(spec, "open_clip", architecture, open_clip.list_models(), error) from error
    model = model.eval().to(dtype)
    tokenizer = open_clip.get_tokenizer(architecture)
    classifier = zero_shot_classifier(model, tokenizer, device=device)
    return ZeroShot(model, transform, classifier, name=spec.name)


def _cannot(
    spec: ModelEntry, library: str, name: str, known: Sequence[str], error: Exception
) -> ConfigError:
    hint = did_you_mean(name, known) if name not in known else ""
    away = " The Hub is not asked (HF_HUB_OFFLINE)." if offline() else ""
    return ConfigError(f"{library} cannot make {spec.name!r}: {first_line(error)}.{hint}{away}")
