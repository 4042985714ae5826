# SPDX-License-Identifier: Apache-2.0
"""Methods that choose by what they have learned, as the folder of a model brings it along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from visprune.errors import ConfigError
from visprune.eval.models.identity import tensors_hash

__all__ = ["about_learned", "taught"]


def taught(run: Any, learned: Mapping[str, Tensor] | None, name: str) -> Any:
    """The run, whose method is given what it has learned; nothing where it learns nothing.

    Args:
        run: in force; removed where this raises.
        learned: what came with the model (:func:`visprune.machine.saved.read_learned`).
        name: of the model.

    Raises:
        ConfigError: nothing came with it, it does not fit, or the method was built with modules of
            its own, which no record could name.
    """
    try:
        if run.learned is not None:
            _teach(run, learned, name)
    except ConfigError:
        run.remove()
        raise
    return run


def _teach(run: Any, learned: Mapping[str, Tensor] | None, name: str) -> None:
    method = run.method.name
    if isinstance(getattr(run.method, "learned", None), nn.Module):
        raise ConfigError(
            f"{method} was built with modules of its own (learned=...), which no record can name. "
            f"Save the model with it (visprune.save_pretrained) and evaluate the folder."
        )
    if learned is None:
        raise ConfigError(
            f"{method} chooses by a predictor that is learned, and {name} comes without one. Train "
            f"it (`visprune train`) and evaluate the folder that comes out."
        )
    try:
        run.learned.load_state_dict(dict(learned))
    except RuntimeError as error:
        raise ConfigError(f"What {name} has learned does not fit {method}: {error}") from error


def about_learned(learned: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What a record's cell says of it: a hash, where there is something."""
    return {} if learned is None else {"learned": tensors_hash(*learned.values())}
