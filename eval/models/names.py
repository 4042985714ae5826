# SPDX-License-Identifier: Apache-2.0
"""What a study says of models: what can be checked before anything is loaded.

Nothing heavy is imported until a library's own names are looked up: the command line asks
:func:`check_kind` before PyTorch is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visprune.errors import ConfigError, did_you_mean

__all__ = [
    "EMBEDDED",
    "LIBRARIES",
    "check_kind",
    "check_name",
    "check_ran_by",
    "check_transformers",
]

EMBEDDED = "embedded"
LIBRARIES = ("timm", "open_clip")
_ENGINES = ("transformers", "vllm")
_DTYPES = ("auto", "float32", "float16", "bfloat16")


def check_name(name: str, checkpoint: str | None = None) -> None:
    """Refuse what no machine and no download has a model for; nothing is loaded.

    Args:
        name: as a study has it.
        checkpoint: weights of a timm or open_clip model, in place of pretrained ones.

    Raises:
        ConfigError: the library, the architecture or the pretrained weights are unknown, or an
            open_clip model has no weights named.
    """
    check_kind(name)
    library, colon, rest = name.partition(":")
    if colon and not Path(name).is_dir():
        (_check_timm if library == "timm" else _check_open_clip)(name, rest, checkpoint)


def check_ran_by(dtype: str, engine: str) -> None:
    """Refuse a type of numbers or an engine that there is not.

    Raises:
        ConfigError: an unknown one.
    """
    if dtype not in _DTYPES:
        raise ConfigError(
            f"dtype is one of {', '.join(_DTYPES)}; got {dtype!r}."
            f"{did_you_mean(str(dtype), _DTYPES)}"
        )
    if engine not in _ENGINES:
        raise ConfigError(
            f"engine is one of {', '.join(_ENGINES)}; got {engine!r}."
            f"{did_you_mean(str(engine), _ENGINES)}"
        )


def check_kind(name: str) -> None:
    """Refuse a name of no kind that there is; what a library calls its models is not looked up.

    Raises:
        ConfigError: it is neither a folder, a name as the Hub has them, nor of a known library.
    """
    if Path(name).is_dir():
        return
    library, colon, _ = name.partition(":")
    if not colon:
        check_transformers(name)
    elif library not in LIBRARIES:
        raise ConfigError(
            f"Unknown model {name!r}.{did_you_mean(library, LIBRARIES)} Write timm:NAME, "
            f"open_clip:NAME/PRETRAINED, a folder, a name on the Hub, or {EMBEDDED!r}."
        )


def check_transformers(name: str) -> None:
    """Refuse what is neither the embedded model, a folder, nor a name as the Hub has them.

    Raises:
        ConfigError: it is none of them.
    """
    if name != EMBEDDED and "/" not in name and not Path(name).is_dir():
        raise ConfigError(
            f"There is no model {name!r}.{did_you_mean(name, [EMBEDDED])} Give a folder "
            f"with a transformers model, a name on the Hub such as llava-hf/llava-1.5-7b-hf, "
            f"timm:NAME, open_clip:NAME/PRETRAINED, or {EMBEDDED!r}."
        )


def _check_timm(whole: str, name: str, checkpoint: str | None) -> None:
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
    if tag and tag not in known and checkpoint is None:
        raise ConfigError(_no_weights(whole, tag, known))


def _check_open_clip(whole: str, name: str, checkpoint: str | None) -> None:
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
    if checkpoint is not None or Path(tag).is_file():
        return
    if not tag:
        raise ConfigError(
            f"{whole!r} names no weights, and without any open_clip makes a model of random "
            f"ones. Write open_clip:{architecture}/PRETRAINED ({_some(known)}), or give the model "
            f"a checkpoint."
        )
    if tag.lower().replace("-", "_") not in known:  # open_clip reads it like that
        raise ConfigError(_no_weights(whole, tag, known))


def _no_weights(whole: str, tag: str, known: Sequence[str]) -> str:
    return (
        f"{whole!r}: there are no pretrained weights {tag!r}.{did_you_mean(tag, known)} "
        f"There are: {_some(known)}."
    )


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:6]) or "none") + " ..." * (len(names) > 6)
