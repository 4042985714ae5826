# SPDX-License-Identifier: Apache-2.0
"""Gates of key heads, which tell those that retrieve from those that stream: numbers, or a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visprune.core.method import ModelSpec
from visprune.core.numeric import is_number, plain
from visprune.errors import ConfigError, first_line

Gates = tuple[tuple[float, ...], ...]


def as_gates(name: str, given: Any) -> Gates | None:
    """Gates as a method takes them.

    Args:
        name: of the method, for messages.
        given: of every layer, of every key head, a number; or the path of a file that ``visprune
            calibrate heads`` wrote; ``None``: there are none.

    Raises:
        ConfigError: no such file, or these are not rows of numbers.
    """
    if given is None:
        return None
    if isinstance(given, str | Path):
        given = _read(name, Path(given))
    rows = [row for row in given if isinstance(row, Sequence)] if _is_list(given) else []
    whole = bool(rows) and len(rows) == len(given)
    if not whole or not all(is_number(x) and math.isfinite(x) for row in rows for x in row):
        raise ConfigError(
            f"{name}: gates are one row of finite numbers for each layer, a number for each key "
            f"head (an empty row for a layer that is left whole), or the path of a file of "
            f"`visprune calibrate heads`; got {given!r:.80}."
        )
    return tuple(tuple(float(plain(x)) for x in row) for row in rows)


def check_layers(name: str, gates: Gates | None, spec: ModelSpec) -> None:
    """Refuse gates of a model with another number of layers.

    Raises:
        ConfigError: they are.
    """
    if gates is not None and len(gates) != spec.num_layers:
        raise ConfigError(
            f"{name}: gates has {len(gates)} layers; {spec.family} has {spec.num_layers}. Give one "
            f"row each: `visprune calibrate heads` measures them on your model."
        )


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes)


def _read(name: str, path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: gates={str(path)!r} is no file of `visprune calibrate heads`: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(found, dict) or "gates" not in found:
        raise ConfigError(
            f"{name}: {str(path)!r} has no entry 'gates'; give a file that `visprune calibrate "
            f"heads` wrote."
        )
    return found["gates"]
