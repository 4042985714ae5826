# SPDX-License-Identifier: Apache-2.0
"""Names of models that a study gives: what can be said of them before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visprune.errors import ConfigError, did_you_mean
from visprune.eval.models.base import EMBEDDED, LIBRARIES, ModelEntry

__all__ = ["check_name", "check_transformers"]


def check_name(spec: ModelEntry) -> None:
    """Refuse what no machine and no download has a model for; nothing is loaded.

    Raises:
        ConfigError: the library, the architecture or the pretrained weights are unknown, or an
            open_clip model has no weights named.
    """
    library, colon, name = spec.name.partition(":")
    if Path(spec.name).is_dir():
        return
    if not colon:
        check_transformers(spec)
        return
    if library not in LIBRARIES:
        raise ConfigError(
            f"Unknown model {spec.name!r}.{did_you_mean(library, LIBRARIES)} Write timm:NAME, "
            f"open_clip:NAME/PRETRAINED, a folder, a name on the Hub, or {EMBEDDED!r}."
        )
    (_check_timm if library == "timm" else _check_open_clip)(spec, name)


def check_transformers(spec: ModelEntry) -> None:
    """Refuse what is neither the embedded model, a folder, nor a name as the Hub has them.

    Raises:
        ConfigError: it is none of them.
    """
    if spec.name != EMBEDDED and "/" not in spec.name and not Path(spec.name).is_dir():
        raise ConfigError(
            f"There is no model {spec.name!r}.{did_you_mean(spec.name, [EMBEDDED])} Give a folder "
            f"with a transformers model, a name on the Hub such as llava-hf/llava-1.5-7b-hf, "
            f"timm:NAME, open_clip:NAME/PRETRAINED, or {EMBEDDED!r}."
        )


def _check_timm(spec: ModelEntry, name: str) -> None:
    import timm

    import visprune.backbones.vit  # noqa: F401 - registers our architectures in timm

    if ":" in name:  # of the Hub, or a folder
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise ConfigError(
            f"timm has no model {architecture!r}.{hint} timm.list_models() has all names."
        )
    known = [n.partition(".")[2] for n in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in known and spec.checkpoint is None:
        raise ConfigError(_no_weights(spec, tag, known))


def _check_open_clip(spec: ModelEntry, name: str) -> None:
    import open_clip

    architecture, _, tag = name.partition("/")
    if ":" in architecture:  # of the Hub, or a folder
        return
    if architecture not in open_clip.list_models():
        hint = did_you_mean(architecture, open_clip.list_models())
        raise ConfigError(
            f"open_clip has no model {architecture!r}.{hint} open_clip.list_models() has all names."
        )
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if spec.checkpoint is not None or Path(tag).is_file():
        return
    if not tag:
        raise ConfigError(
            f"{spec.name!r} names no weights, and without any open_clip makes a model of random "
            f"ones. Write open_clip:{architecture}/PRETRAINED ({_some(known)}), or give the model "
            f"a checkpoint."
        )
    if tag.lower().replace("-", "_") not in known:  # open_clip reads it like that
        raise ConfigError(_no_weights(spec, tag, known))


def _no_weights(spec: ModelEntry, tag: str, known: Sequence[str]) -> str:
    return (
        f"{spec.name!r}: there are no pretrained weights {tag!r}.{did_you_mean(tag, known)} "
        f"There are: {_some(known)}."
    )


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:6]) or "none") + " ..." * (len(names) > 6)
