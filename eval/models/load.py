# SPDX-License-Identifier: Apache-2.0
"""Load a model by name: a folder, a name on the Hub, of timm or of open_clip."""

from __future__ import annotations

import json
import re
from pathlib import Path

from visprune.errors import ConfigError
from visprune.eval.models.base import EvalModel, ModelEntry
from visprune.eval.models.names import LIBRARIES, check_name
from visprune.eval.tasks.loading import Unreachable
from visprune.machine.written import finish

__all__ = ["load_model"]


# What the Hub, or a library's own download, may have.
_ELSEWHERE = re.compile(r"\w[\w.-]*/[\w.-]+|(timm|open_clip):(?!local-dir:).+")


def load_model(spec: ModelEntry | str, *, local_rank: int = 0) -> EvalModel:
    """Load a model by name.

    Raises:
        Unreachable: another machine or the Hub may have it, and it cannot be had here.
        ConfigError: there is no such model.
    """
    spec = ModelEntry(spec) if isinstance(spec, str) else spec
    check_name(spec.name, spec.checkpoint)
    finish(Path(spec.name))
    try:
        return _load(spec, local_rank)
    except ConfigError as error:
        here = Path(spec.name).is_dir() or not _ELSEWHERE.fullmatch(spec.name)
        if here or isinstance(error, Unreachable):
            raise
        raise Unreachable(str(error)) from error


def _load(spec: ModelEntry, local_rank: int) -> EvalModel:
    library, colon, name = spec.name.partition(":")
    if spec.engine == "vllm":
        if (colon and library in LIBRARIES) or _is_timm_folder(Path(spec.name)):
            raise ConfigError(
                f"{spec.name!r} is an image classifier, and the engine vllm answers with text. "
                f"Leave the engine out."
            )
        from visprune.eval.models import served

        return served.load(spec)
    if colon and library in LIBRARIES:
        from visprune.eval.models import load_vit

        return load_vit.load(spec, library, name, local_rank)
    if _is_timm_folder(Path(spec.name)):
        from visprune.eval.models import load_vit

        return load_vit.load(spec, "timm", f"local-dir:{spec.name}", local_rank)
    from visprune.eval.models import load_vlm

    return load_vlm.load(spec, local_rank)


def _is_timm_folder(path: Path) -> bool:
    """Whether a folder holds a timm model in the Hub's layout."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config
