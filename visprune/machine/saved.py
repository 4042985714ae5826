# SPDX-License-Identifier: Apache-2.0
"""A pruned model as a folder: the model in its library's layout, the method beside it."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visprune.backbones.storage import read_model, write_model
from visprune.errors import ConfigError, first_line
from visprune.machine.run import Run, prune
from visprune.machine.written import finish, replace_files

__all__ = [
    "METHOD_FILE",
    "PROCESSOR_FILES",
    "load_pretrained",
    "read_asked",
    "read_learned",
    "read_method",
    "save_pretrained",
]

METHOD_FILE, LEARNED_FILE = "visprune.json", "visprune.safetensors"
# One of them is there where a processor was saved.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
CONFIG_FILE, ATTENTION = "config.json", "with_attention"


def save_pretrained(
    run: Run | nn.Module,
    folder: str | Path,
    *,
    processor: Any = None,
    model: nn.Module | None = None,
    model_args: dict[str, Any] | None = None,
    asked: dict[str, Any] | None = None,
) -> Path:
    """Write a model and the method that is in force on it.

    The folder is one that ``from_pretrained`` of transformers or ``timm.create_model("local-dir:
    FOLDER", pretrained=True)`` reads, and that can be uploaded to the Hub as it is; they load the
    model without the method. ``visprune.json`` holds the method and its parameters,
    ``visprune.safetensors`` what it has learned. Attention that
    :func:`visprune.backbones.vit.with_attention` replaced is noted in ``config.json``; only
    :func:`load_pretrained` replaces it again.

    In a folder that is there, files of the same names are replaced once all are written, and
    nothing else is touched: no file that another tool or you put there is removed, and a model card
    (``README.md``) stays. A kill at any moment leaves the old files or the new: what is half moved
    :func:`load_pretrained`, ``visprune eval`` and the next saving finish.

    Args:
        run: What :func:`visprune.prune` returned, or a model without a method.
        folder: Where to.
        processor: A processor to save beside it (transformers); without one in the folder,
            ``visprune eval``, ``visprune show`` and lmms-eval cannot load a vision-language model
            from it, and a warning says so.
        model: What to save in place of the run's model, such as the PEFT model around it.
        model_args: What a timm model was created with beside its name (timm before 1.0.31).
        asked: How questions are put to a vision-language model, as ``style`` and ``template`` of
            :class:`visprune.eval.models.vlm.VLM`; ``visprune eval`` on the folder asks like that.

    Returns:
        The folder.

    Raises:
        UnsupportedModel: The model is neither of transformers nor of timm.
        ConfigError: The folder cannot be written; what was there before is whole.
    """
    target = Path(folder)
    method = None if isinstance(run, nn.Module) else run.method
    inner = run if isinstance(run, nn.Module) else (model or _whole(run))
    learned = getattr(run, "learned", None) if method is not None else None
    content: dict[str, Any] = {} if method is None else {"method": method.to_dict()}
    content |= {} if asked is None else {"asked": asked}

    def write(fresh: Path) -> None:
        _write_without(learned, inner, fresh, model_args)
        if processor is not None:
            processor.save_pretrained(fresh)
        if content:
            text = json.dumps({"visprune": version("visprune"), **content}, indent=2) + "\n"
            (fresh / METHOD_FILE).write_text(text, encoding="utf-8")
        if learned is not None:
            tensors = {k: v.detach().cpu().contiguous() for k, v in learned.state_dict().items()}
            save_file(tensors, fresh / LEARNED_FILE)

    try:
        replace_files(target, write, owned=(METHOD_FILE, LEARNED_FILE))
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot write {str(target)!r}: {why}. What was there is whole.") from (
            error
        )
    if processor is None:
        _say_what_is_missing(inner, target)
    return target


def _whole(run: Run) -> nn.Module:
    """The model that was pruned: an encoder's own, or what it was given inside of."""
    outer: nn.Module | None = getattr(run.adapter, "outer", None)
    return run.adapter.model if outer is None else outer


def _say_what_is_missing(model: nn.Module, folder: Path) -> None:
    """Warn where a vision-language model was saved and its folder holds no processor."""
    there = any((folder / name).is_file() for name in PROCESSOR_FILES)
    if there or hasattr(model, "pretrained_cfg") or not hasattr(model, "generate"):
        return
    warnings.warn(
        f"{str(folder)!r} holds no processor (tokenizer, picture sizes): load_pretrained reads the "
        f"model, but visprune eval, visprune show and lmms-eval need one. Give processor=... to "
        f"save_pretrained, or call processor.save_pretrained({str(folder)!r}).",
        stacklevel=3,
    )


def load_pretrained(folder: str | Path, **options: Any) -> tuple[nn.Module, Run | None]:
    """Load what :func:`save_pretrained` wrote, with the method in force.

    Args:
        folder: The folder, or the name of a repository on the Hub.
        **options: Passed on to the model's library (``dtype`` ...).

    Returns:
        The model in evaluation mode, and the run that prunes it; ``None`` where the folder names no
        method.

    Raises:
        ConfigError: There is no such folder, or what it holds cannot be used.
    """
    path = Path(folder).expanduser()
    finish(path)
    if not path.is_dir():
        path = _from_hub(str(folder))
    calls = _replaced_attention(path)
    if calls:
        from visprune.backbones.vit.with_attention_saved import rebuilt

        model = rebuilt(path, calls, options)
    else:
        model = read_model(path, **options)
    method = read_method(path)
    if method is None:
        return model, None
    run = prune(model, method.pop("method"), **method)
    learned = getattr(run, "learned", None)
    if learned is not None:
        if not (path / LEARNED_FILE).is_file():
            raise ConfigError(f"{str(path)!r} lacks {LEARNED_FILE}, what its method has learned.")
        try:
            learned.load_state_dict(load_file(path / LEARNED_FILE))
        except (RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{path / LEARNED_FILE} does not fit the method: {error}") from error
    return model, run


def read_method(folder: str | Path) -> dict[str, Any] | None:
    """The method of a folder as ``{"method": name, **parameters}``; ``None`` where it names none.

    Raises:
        ConfigError: The file is damaged.
    """
    return _beside(folder, "method")


def read_asked(folder: str | Path) -> dict[str, Any] | None:
    """How questions are put to the model of a folder; ``None`` where it does not say.

    Raises:
        ConfigError: The file is damaged.
    """
    return _beside(folder, "asked")


def _beside(folder: str | Path, key: str) -> dict[str, Any] | None:
    """A section of ``visprune.json``."""
    finish(Path(folder))
    path = Path(folder) / METHOD_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not {"method", "asked"} & set(content):
            raise KeyError(key)
        return None if content.get(key) is None else dict(content[key])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: expected {{'method': {{...}}}}.") from error


def read_learned(folder: str | Path) -> dict[str, Tensor] | None:
    """What the method of a folder has learned, by name; ``None`` where there is nothing.

    Raises:
        ConfigError: The file is damaged.
    """
    path = Path(folder) / LEARNED_FILE
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged: {error}.") from error


def _write_without(
    learned: nn.Module | None, model: nn.Module, folder: Path, model_args: dict[str, Any] | None
) -> None:
    """Write a model without the method's own modules, which its library does not know.

    Attention that was replaced is noted in timm's configuration.
    """
    modules: dict[str, Any] = model._modules
    name = next((key for key, part in modules.items() if part is learned), None)
    if learned is not None and name is not None:
        del modules[name]
    try:
        write_model(model, folder, model_args=model_args)
    finally:
        if learned is not None and name is not None:
            modules[name] = learned
    if hasattr(model, "pretrained_cfg"):  # of timm
        from visprune.backbones.vit.with_attention_saved import calls_of

        calls, config = calls_of(model), folder / CONFIG_FILE
        if calls:
            fields = json.loads(config.read_text(encoding="utf-8")) | {ATTENTION: calls}
            config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _replaced_attention(folder: Path) -> Any:
    """What the configuration of a folder says of replaced attention; None where nothing."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(ATTENTION)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}.") from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{name!r} is neither a folder nor a repository that can be had from the Hub: "
            f"{first_line(error)}."
        ) from error
