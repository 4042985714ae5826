# SPDX-License-Identifier: Apache-2.0
"""What learns: the model, its token reduction, its moving average, its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.utils import ModelEmaV3
from torch import nn

from visprune.errors import ConfigError, did_you_mean, first_line
from visprune.machine.saved import load_pretrained
from visprune.train.image.recipe import ImageRecipe, ModelConfig

__all__ = ["build_model", "data_config", "make_ema", "make_teacher"]


def build_model(config: ModelConfig, classes: int, seed: int) -> nn.Module:
    """Create the model by timm, with weights as the recipe says.

    Args:
        config: The recipe's section.
        classes: Number of classes.
        seed: Seed of random weights.

    Raises:
        ConfigError: timm does not know the name, or its weights do not fit.
    """
    import visprune.backbones.vit  # noqa: F401 - registers our models

    torch.manual_seed(seed)
    if not timm.is_model(config.name):
        names = timm.list_models()
        raise ConfigError(
            f"model.name is {config.name!r}, which timm does not know."
            f"{did_you_mean(config.name, names)} See timm.list_models()."
        )
    overlay = dict(config.cfg)
    size = config.args.get("img_size")
    if size is not None:
        pair = size if isinstance(size, list) else [size, size]
        overlay.setdefault("input_size", (3, *pair))
    args: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in config.args.items()}
    model = _created(
        config.name,
        "model",
        pretrained=config.pretrained,
        pretrained_cfg_overlay=overlay or None,
        num_classes=classes,
        **args,
    )
    if config.start_from:
        load_into(model, config.start_from)
    if config.grad_checkpointing:
        switch: Any = model.set_grad_checkpointing
        switch(True)
    return model


def _created(name: str, where: str, **args: Any) -> Any:
    """Have timm create a model.

    Raises:
        ConfigError: An argument does not fit, or its weights cannot be fetched.
    """
    try:
        return timm.create_model(name, **args)
    except TypeError as error:
        raise ConfigError(f"{where}.args do not fit {name}: {error}.") from error
    except (OSError, RuntimeError) as error:
        if not args.get("pretrained"):
            raise
        raise ConfigError(
            f"{where}: the pretrained weights of {name} cannot be had ({first_line(error)}). They "
            f"come over the network once and stay in a cache; from a folder: model.start_from."
        ) from error


def load_into(model: nn.Module, folder: str) -> list[str]:
    """Load a folder's weights into a model.

    Args:
        model: The model; what the folder has no weights for (a new head, a predictor) stays.
        folder: With ``model.safetensors`` in it.

    Returns:
        Names of the weights that stayed as they were.

    Raises:
        ConfigError: There is no such file, or its weights are those of another model.
    """
    path = Path(folder).expanduser() / "model.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"There is no {path.name} in {str(path.parent)!r} to start from. Such a folder is the "
            f"`weights` of a training: run the recipe of the dense model first (visprune train "
            f"RECIPE.yaml --out {path.parent.parent}), or name another folder with "
            f"model.start_from=FOLDER (and distill.teacher=FOLDER)."
        )
    own, saved = model.state_dict(), load_file(path)
    head = {k for k in saved if k in own and own[k].shape != saved[k].shape and _in_head(model, k)}
    wrong = [
        f"{k} {tuple(saved[k].shape)}, here {tuple(own[k].shape) if k in own else 'absent'}"
        for k in saved
        if k not in head and (k not in own or own[k].shape != saved[k].shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{str(path)!r} holds the weights of another model: {'; '.join(wrong[:3])}{more}."
        )
    model.load_state_dict({k: v for k, v in saved.items() if k not in head}, strict=False)
    return [k for k in own if k not in saved or k in head]


def _in_head(model: nn.Module, key: str) -> bool:
    cfg: Any = model.pretrained_cfg
    names = cfg.get("classifier") or "head"
    names = (names,) if isinstance(names, str) else tuple(names)
    return key.startswith(tuple(f"{name}." for name in names))


def data_config(model: nn.Module) -> dict[str, Any]:
    """The data configuration of a model, by timm: input size, mean, std, interpolation, crop."""
    return resolve_data_config({}, model=model)


def make_ema(model: nn.Module, recipe: ImageRecipe) -> ModelEmaV3 | None:
    """A moving average of a model without hooks, or None where the recipe asks for none."""
    if recipe.ema is None:
        return None
    return ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)


def make_teacher(recipe: ImageRecipe, classes: int, device: torch.device) -> nn.Module | None:
    """The frozen teacher.

    Raises:
        ConfigError: There is no such model, or it has other classes.
    """
    if recipe.distill is None:
        return None
    name = recipe.distill.teacher
    import visprune.backbones.vit  # noqa: F401 - registers our models

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            inside = folder / "weights"
            hint = f" Did you mean {str(inside)!r}?" if inside.is_dir() else ""
            raise ConfigError(f"distill.teacher {name!r} holds no config.json.{hint}")
        teacher, run = load_pretrained(folder)
        if run is not None:
            run.remove()
    elif timm.is_model(name):
        teacher = _created(name, "distill.teacher", pretrained=True)
    else:
        raise ConfigError(f"distill.teacher {name!r} is neither a folder nor a name of timm.")
    if teacher.num_classes != classes:
        raise ConfigError(
            f"distill.teacher {name!r} tells {teacher.num_classes} classes apart, the data holds "
            f"{classes}."
        )
    return teacher.to(device).eval().requires_grad_(False)
